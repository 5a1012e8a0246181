"""Resyncs: syncs that are requested because changes of a vector table may have been missed.

Requests are counted (`resync_requested_seq`). A task completes the requests that were made before it was claimed
(`resync_completed_seq`), so no clock decides whether a change was seen. While a CDC consumer has the changed keys in memory
(`buffered_by_run_id`), it completes the request itself; if its run ends first, a sync does. A request that is made while a
task completes an earlier one may be buffered as well. Otherwise, under constant writes, each resync would leave another one.

Every function here locks the row of `vector_tables` first, as tasks do when they begin and end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, case, func, null, or_, select, update
from sqlalchemy.orm import Session

from embedd_dagster.catalog.due_tables import has_live_task, may_sync
from embedd_dagster.catalog.tables import CdcState, CdcStreamRow, Task, VectorTable
from embedd_dagster.core.status import TaskStatus

_SHORTEST_DELAY: Final = timedelta(minutes=1)
_LONGEST_DELAY: Final = timedelta(hours=1)

is_pending = CdcState.resync_requested_seq > CdcState.resync_completed_seq
_is_being_completed = (
    select(Task.id)
    .where(
        Task.target_id == CdcState.vector_table_id,
        Task.status == TaskStatus.RUNNING.value,
        Task.resync >= CdcState.resync_requested_seq,
    )
    .exists()
)
"""The running task was claimed after the last request. If it does not complete, see `requeue`."""


def _lock(session: Session, condition: ColumnElement[bool]) -> list[str]:
    """Locks vector tables in the order of their ids; returns the ids."""
    statement = select(VectorTable.id).where(condition).order_by(VectorTable.id).with_for_update()
    return list(session.scalars(statement))


def request(
    session: Session,
    vector_table_ids: Collection[str],
    reason: str,
    *,
    options: Mapping[str, Any] | None = None,
    buffered_by: str | None = None,
) -> None:
    """Requests a resync. One that no consumer has buffered stays so until a task is running that completes it."""
    if not vector_table_ids:
        return
    record_freshness(session, vector_table_ids)
    # locked, so that the update sees every task that is running, and none that has just failed
    present = _lock(session, and_(VectorTable.id.in_(vector_table_ids), VectorTable.deleted_at.is_(None)))
    session.execute(
        update(CdcState)
        .where(CdcState.vector_table_id.in_(present))
        .values(
            resync_requested_seq=CdcState.resync_requested_seq + 1,
            resync_reason=reason,
            resync_options=CdcState.resync_options.concat(dict(options or {})),
            buffered_by_run_id=case(
                (and_(is_pending, CdcState.buffered_by_run_id.is_(None), ~_is_being_completed), null()),
                else_=buffered_by,
            ),
            resync_not_before=None,
        )
    )


def record_freshness(session: Session, vector_table_ids: Collection[str]) -> None:
    """Records until when tables were equal to their source, if CDC kept them so: a request ends that."""
    session.execute(
        update(VectorTable)
        .where(
            VectorTable.id.in_(vector_table_ids),
            CdcState.vector_table_id == VectorTable.id,
            CdcStreamRow.connection_id == VectorTable.connection_id,
            CdcStreamRow.caught_up_at > CdcState.subscribed_since,
            ~is_pending,
            ~VectorTable.paused,
        )
        .values(last_sync_at=func.greatest(VectorTable.last_sync_at, CdcStreamRow.caught_up_at))
    )


def record_buffered(session: Session, changes: Mapping[str, int]) -> None:
    """Records how many changes wait to be applied, by vector table."""
    for vector_table_id in _lock(session, VectorTable.id.in_(changes)):
        session.execute(
            update(CdcState)
            .where(CdcState.vector_table_id == vector_table_id)
            .values(changes_pending=changes[vector_table_id])
        )


def clear_buffered(session: Session, vector_table_id: str, run_id: str) -> None:
    """Completes the request that this run had buffered; those of others stay pending."""
    record_buffered(session, {vector_table_id: 0})
    session.execute(
        update(CdcState)
        .where(CdcState.vector_table_id == vector_table_id, CdcState.buffered_by_run_id == run_id)
        .values(
            resync_completed_seq=CdcState.resync_requested_seq,
            buffered_by_run_id=None,
            resync_reason=None,
            resync_options={},
        )
    )


def discard_buffered(session: Session, connection_id: str) -> None:
    """Leaves to a sync what consumers of this connection had buffered: their memory is lost."""
    buffered = CdcState.buffered_by_run_id.is_not(None) | (CdcState.changes_pending > 0)
    with_buffer = select(CdcState.vector_table_id).where(buffered)
    locked = _lock(session, and_(VectorTable.connection_id == connection_id, VectorTable.id.in_(with_buffer)))
    session.execute(
        update(CdcState)
        .where(CdcState.vector_table_id.in_(locked))
        .values(buffered_by_run_id=None, changes_pending=0)
    )  # fmt: skip


def complete(state: CdcState, task: Task) -> None:
    """A task has brought the vector table to the state that its source had after the claim."""
    state.resync_completed_seq = max(state.resync_completed_seq, task.resync)
    if state.resync_completed_seq >= state.resync_requested_seq:
        state.resync_reason = state.buffered_by_run_id = state.resync_not_before = None
        state.resync_options = {}


def requeue(state: CdcState, task: Task) -> None:
    """A task has ended without completing its resync: another sync does, including keys that a consumer has buffered."""
    if state.resync_completed_seq < task.resync:
        state.buffered_by_run_id, state.changes_pending = None, 0


def postpone(table: VectorTable, instant: datetime) -> None:
    """Delays a pending resync after a failed task: the older the last sync, the longer."""
    if table.cdc.resync_requested_seq > table.cdc.resync_completed_seq:
        since = instant - (table.last_sync_at or table.created_at)
        table.cdc.resync_not_before = instant + min(max(since / 2, _SHORTEST_DELAY), _LONGEST_DELAY)


@dataclass(frozen=True, slots=True)
class PendingResync:
    """A vector table with a pending resync that may begin now."""

    vector_table_id: str
    reason: str
    options: dict[str, Any]


def due(session: Session, limit: int) -> list[PendingResync]:
    """Pending resyncs that may begin: not buffered, and the table is built, not paused and without a live task."""
    statement = (
        select(VectorTable.id, CdcState.resync_reason, CdcState.resync_options)
        .join(VectorTable, VectorTable.id == CdcState.vector_table_id)
        .where(
            is_pending,
            CdcState.buffered_by_run_id.is_(None),
            VectorTable.live_version.is_not(None),
            VectorTable.deleted_at.is_(None),
            ~VectorTable.paused,
            may_sync,
            or_(CdcState.resync_not_before.is_(None), CdcState.resync_not_before <= func.clock_timestamp()),
            ~has_live_task(),
        )
        .order_by(VectorTable.id)
        .limit(limit)
    )
    return [PendingResync(key, reason or "", dict(options)) for key, reason, options in session.execute(statement)]
