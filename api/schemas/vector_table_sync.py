"""Sync of vector tables, and the rows that failed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Timestamp
from ..schemas.vector_tables import SyncStatusName


class SyncStatusAnswer(Answer):
    """How true the vectors are to their source."""

    vector_table_id: str
    sync_status: SyncStatusName
    last_sync_at: Timestamp | None = Field(
        description="The latest time at which the vectors are known to have been equal to the source"
    )
    rows_pending: int = Field(
        description="Rows that the running or next build still has to write, as far as known; "
        "of a cdc table, changes that were read and are not yet applied"
    )
    staleness_secs: float | None = Field(description="Seconds since last_sync_at; null before the first sync")
    log_lag_bytes: int | None = Field(
        description="cdc tables: how much of its log the source keeps for what is not yet applied (of the slot, "
        "which all cdc tables of a connection share); null where nothing is followed"
    )
    last_error: str | None = Field(
        description="The last error; of a cdc table that has none of its own, what holds up all cdc tables of the connection"
    )
    last_error_at: Timestamp | None


class SyncOptions(Body):
    """How to sync."""

    confirm_mass_delete: bool = Field(
        default=False, description="The source lost most of its rows on purpose: mirror that"
    )
    full: bool = Field(
        default=False, description="Compare every row, not only what the source's digests show as changed"
    )


class SyncStartedAnswer(Answer):
    """A sync that has been queued."""

    vector_table_id: str
    status: Literal["syncing"]
    task_id: str = Field(description="Its progress: GET /v1/tasks/{task_id}")


class FailedRowAnswer(Answer):
    """A row that has no vector, and why; never its content."""

    key: int | float | str = Field(description="Its primary key")
    step: str = Field(description="Where it failed", examples=["embed"])
    error_code: str
    error_message: str
    attempts: int
    first_failed_at: Timestamp
    last_failed_at: Timestamp


class FailedRowList(ListAnswer[FailedRowAnswer]):
    """A page of failed rows."""


class RetryStartedAnswer(SyncStartedAnswer):
    """A sync that tries failed rows again."""

    failed_rows: int = Field(description="How many there are to try")
