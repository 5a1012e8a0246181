"""Sync of vector tables, and failed rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Timestamp
from ..schemas.vector_tables import SyncStatusName


class SyncStatusAnswer(Answer):
    """How current the vectors are compared with their source."""

    vector_table_id: str
    sync_status: SyncStatusName
    last_sync_at: Timestamp | None = Field(
        description="The latest time at which the vectors are known to have matched the source"
    )
    rows_pending: int = Field(
        description="Rows that the running or next backfill still has to write, if known; "
        "for a cdc table, changes that were read and are not applied yet"
    )
    staleness_secs: float | None = Field(description="Seconds since last_sync_at; null before the first sync")
    log_lag_bytes: int | None = Field(
        description="cdc tables: bytes of log that the source keeps for changes that are not applied yet (one number "
        "for all cdc tables of a connection); null if there is no CDC stream"
    )
    last_error: str | None = Field(
        description="The last error; for a cdc table without one, the error that stops all cdc tables of the connection"
    )
    last_error_at: Timestamp | None


class SyncOptions(Body):
    """Options of a sync."""

    confirm_mass_delete: bool = Field(
        default=False, description="Most rows were deleted from the source on purpose: delete their vectors too"
    )
    full: bool = Field(default=False, description="Compare all rows, even if the digests match")


class SyncStartedAnswer(Answer):
    """A queued sync."""

    vector_table_id: str
    status: Literal["syncing"]
    task_id: str = Field(description="GET /v1/tasks/{task_id} shows its progress")


class FailedRowAnswer(Answer):
    """A row that has no vector, and the reason. Never its content."""

    key: int | float | str = Field(description="Its primary key")
    step: str = Field(description="The step that failed", examples=["embed"])
    error_code: str
    error_message: str
    attempts: int
    first_failed_at: Timestamp
    last_failed_at: Timestamp


class FailedRowList(ListAnswer[FailedRowAnswer]):
    """A page of failed rows."""


class RetryStartedAnswer(SyncStartedAnswer):
    """A sync that retries failed rows."""

    failed_rows: int = Field(description="Number of failed rows")
