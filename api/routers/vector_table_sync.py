"""Sync of vector tables, and failed rows."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from embedd_dagster.catalog import cdc, failed_rows, resyncs, table_details, tasks, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.partitions import RunLabel
from embedd_dagster.catalog.tables import FailedRow, Task, VectorTable
from embedd_dagster.core.keys import decode_key, render_key
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import SyncMode
from embedd_dagster.errors import NotReady

from ..auth import Caller, Reader, Writer
from ..error_codes import error_responses
from ..idempotency import Idempotent, idempotent_responses
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, PageRequest, list_answer
from ..schemas.base import VectorTableId
from ..schemas.vector_table_sync import (
    FailedRowAnswer,
    FailedRowList,
    RetryStartedAnswer,
    SyncOptions,
    SyncStartedAnswer,
    SyncStatusAnswer,
)
from ..strict_json import StrictRoute

router = APIRouter(prefix="/vector-tables/{vector_table_id}", tags=["Sync"], route_class=StrictRoute)

_STARTS = (
    "permission_denied", "vector_table_not_found", "backfill_in_progress", "vector_table_not_ready",
)  # fmt: skip


@router.get("/sync/status", responses=error_responses("vector_table_not_found"))
def get_sync_status(vector_table_id: VectorTableId, caller: Reader) -> SyncStatusAnswer:
    """Get how current the vectors are compared with their source."""
    with caller.state.runtime.catalog.transaction() as session:
        return _shown(session, vector_tables.get(session, caller.environment.id, vector_table_id))


def _shown(session: Session, row: VectorTable) -> SyncStatusAnswer:
    status = SyncStatus(row.sync_status)
    feed = cdc.find(session, row.connection_id) if row.sync_mode == SyncMode.CDC.value else None
    fresh_as_of = cdc.fresh_as_of(row, feed)
    pending = row.cdc.changes_pending
    if status in (SyncStatus.PENDING, SyncStatus.BACKFILLING):
        shown = table_details.read(session, [row.id])[row.id]
        pending = max(0, shown.total_rows - shown.synced_rows)
    elif status is SyncStatus.PENDING_REBACKFILL:
        pending = row.total_rows
    error, error_at = row.last_error, row.last_error_at
    if error is None and feed is not None and not row.paused:  # what stops all tables of the connection
        error, error_at = feed.last_error, feed.last_error_at
    staleness = None if fresh_as_of is None else max(0.0, (now() - fresh_as_of).total_seconds())
    return SyncStatusAnswer(
        vector_table_id=row.id,
        sync_status=status.value,
        last_sync_at=fresh_as_of,
        rows_pending=pending,
        staleness_secs=None if staleness is None else round(staleness, 3),
        log_lag_bytes=None if feed is None else feed.lag_bytes,
        last_error=error,
        last_error_at=error_at,
    )


@router.post(
    "/sync/pause", responses=error_responses("permission_denied", "vector_table_not_found", "sync_already_paused")
)
def pause_sync(vector_table_id: VectorTableId, caller: Writer) -> SyncStatusAnswer:
    """Pause: no sync or re-backfill starts by itself until the pause ends. Queries still work."""
    with caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
        resyncs.record_freshness(session, [row.id])
        session.refresh(row)
        vector_tables.pause(row)
        return _shown(session, row)


@router.post(
    "/sync/resume", responses=error_responses("permission_denied", "vector_table_not_found", "sync_not_paused")
)
def resume_sync(vector_table_id: VectorTableId, caller: Writer) -> SyncStatusAnswer:
    """End a pause."""
    with caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
        vector_tables.resume(row)
        return _shown(session, row)


@router.post("/sync", responses=idempotent_responses(200, *_STARTS))
def start_sync(
    vector_table_id: VectorTableId, caller: Writer, idempotent: Idempotent, body: SyncOptions | None = None
) -> SyncStartedAnswer:
    """Sync now, independent of the schedule. Reads, embeds and writes only what has changed."""
    options = {name: True for name, value in (body.model_dump() if body else {}).items() if value}
    with idempotent, caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
        label = RunLabel.of(row)
        task = _create_sync(session, caller, row, options)
        started = idempotent.remember(
            session, SyncStartedAnswer(vector_table_id=vector_table_id, status="syncing", task_id=task.id)
        )
    caller.state.launcher.launch(task.id, vector_table_id, label, TaskType.SYNC)
    return started


def _create_sync(session: Session, caller: Caller, row: VectorTable, options: dict[str, Any]) -> Task:
    if row.live_version is None and tasks.find_live(session, row.id) is None:
        raise NotReady(
            f"Vector table {row.name!r} has no live vectors to sync.",
            resolution="Start a backfill with POST /v1/vector-tables/{id}/backfill.",
        )
    return tasks.create(
        session,
        row,
        TaskType.SYNC,
        max_attempts=caller.state.settings.max_task_attempts,
        total_rows=row.total_rows,
        options=options,
    )


@router.get("/failed-rows", responses=error_responses("vector_table_not_found"))
def list_failed_rows(
    vector_table_id: VectorTableId, caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> FailedRowList:
    """List the rows that could not be embedded or stored, of the newest vector set that has any."""
    asked = PageRequest.read(limit, cursor)
    with caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id)
        page = failed_rows.page(session, row.id, limit, asked.after)
    return list_answer(FailedRowList, page, asked, _shown_failure)


def _shown_failure(row: FailedRow) -> FailedRowAnswer:
    return FailedRowAnswer(
        key=render_key(decode_key(row.key)),
        step=row.step,
        error_code=row.code,
        error_message=row.message,
        attempts=row.attempts,
        first_failed_at=row.first_failed_at,
        last_failed_at=row.last_failed_at,
    )


@router.post("/failed-rows/retry", responses=idempotent_responses(200, *_STARTS))
def retry_failed_rows(vector_table_id: VectorTableId, caller: Writer, idempotent: Idempotent) -> RetryStartedAnswer:
    """Retry the failed rows, in a sync that starts now."""
    with idempotent, caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
        label = RunLabel.of(row)
        task = _create_sync(session, caller, row, {"retry_failed": True})
        failed = failed_rows.count(session, row.id, row.live_version) if row.live_version is not None else 0
        started = RetryStartedAnswer(
            vector_table_id=vector_table_id, status="syncing", task_id=task.id, failed_rows=failed
        )
        idempotent.remember(session, started)
    caller.state.launcher.launch(task.id, vector_table_id, label, TaskType.SYNC)
    return started
