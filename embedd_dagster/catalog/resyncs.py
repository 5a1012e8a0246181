"""What is owed to a vector table whose changes may have been missed: one sync, which compares it with its source.

Requests are counted (`resync_wanted`), and a task settles those that were made before it was claimed (`resync_done`): so
no clock decides whether a change was seen. A request may be *held* by the follower's run that still has the changed
keys in memory: it settles it itself; when that run is gone, a sync does. While a task pays what nobody holds, what is asked
for beside it may be held: else, under writers that never stop, each owed sync would leave another one owed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, case, func, null, or_, select, update
from sqlalchemy.orm import Session

from embedd_dagster.catalog.tables import ChangeFeed, Task, VectorTable
from embedd_dagster.catalog.vector_tables import may_sync
from embedd_dagster.core.status import LIVE_TASK_STATUSES, TaskStatus

_SHORTEST_DELAY: Final = timedelta(minutes=1)
_LONGEST_DELAY: Final = timedelta(hours=1)
_LIVE: Final = tuple(status.value for status in LIVE_TASK_STATUSES)

is_owed = VectorTable.resync_wanted > VectorTable.resync_done
_is_being_paid = (
    select(Task.id)
    .where(
        Task.target_id == VectorTable.id,
        Task.status == TaskStatus.RUNNING.value,
        Task.resync >= VectorTable.resync_wanted,
    )
    .exists()
)
"""A task is at work that was claimed after all that is owed was asked for; where it does not complete, see `lapse`."""


def request(
    session: Session,
    vector_table_ids: Collection[str],
    reason: str,
    *,
    options: Mapping[str, Any] | None = None,
    held_by: str | None = None,
) -> None:
    """Asks for a comparison with the source. One that nobody holds stays so until a task is at work on it."""
    if not vector_table_ids:
        return
    keep_freshness(session, vector_table_ids)
    mine = and_(VectorTable.id.in_(vector_table_ids), VectorTable.deleted_at.is_(None))
    # a task begins and ends under this lock, so that the statement after it sees which are at work, and none that just failed
    session.execute(select(VectorTable.id).where(mine).order_by(VectorTable.id).with_for_update())
    session.execute(
        update(VectorTable)
        .where(mine)
        .values(
            resync_wanted=VectorTable.resync_wanted + 1,
            resync_reason=reason,
            resync_options=VectorTable.resync_options.concat(dict(options or {})),
            resync_held_by=case(
                (and_(is_owed, VectorTable.resync_held_by.is_(None), ~_is_being_paid), null()), else_=held_by
            ),
            resync_not_before=None,
        )
    )


def keep_freshness(session: Session, vector_table_ids: Collection[str]) -> None:
    """Keeps, of tables that were followed without a gap, until when they were true: from now on that stands still."""
    session.execute(
        update(VectorTable)
        .where(
            VectorTable.id.in_(vector_table_ids),
            ChangeFeed.connection_id == VectorTable.connection_id,
            ChangeFeed.caught_up_at > VectorTable.followed_since,
            ~is_owed,
            ~VectorTable.paused,
        )
        .values(last_sync_at=func.greatest(VectorTable.last_sync_at, ChangeFeed.caught_up_at))
    )


def set_pending(session: Session, changes: Mapping[str, int]) -> None:
    """Records how many changes wait to be applied, by vector table."""
    for vector_table_id, count in changes.items():
        session.execute(update(VectorTable).where(VectorTable.id == vector_table_id).values(changes_pending=count))


def settle_held(session: Session, vector_table_id: str, run_id: str) -> None:
    """What this run noted of a vector table is applied; nothing is settled that was asked for by others."""
    set_pending(session, {vector_table_id: 0})
    session.execute(
        update(VectorTable)
        .where(VectorTable.id == vector_table_id, VectorTable.resync_held_by == run_id)
        .values(
            resync_done=VectorTable.resync_wanted, resync_held_by=None, resync_reason=None, resync_options={}
        )
    )  # fmt: skip


def release(session: Session, connection_id: str) -> None:
    """What followers of this connection held is owed by a sync from now on: their memory is gone."""
    session.execute(
        update(VectorTable)
        .where(
            VectorTable.connection_id == connection_id,
            VectorTable.resync_held_by.is_not(None) | (VectorTable.changes_pending > 0),
        )
        .values(resync_held_by=None, changes_pending=0)
    )


def settle(table: VectorTable, task: Task) -> None:
    """A task has brought the vector table to what its source was after it was claimed."""
    table.resync_done = max(table.resync_done, task.resync)
    if table.resync_done >= table.resync_wanted:
        table.resync_reason = table.resync_held_by = table.resync_not_before = None
        table.resync_options = {}


def lapse(table: VectorTable, task: Task) -> None:
    """A task has ended without paying what it was claimed for: a sync does, whatever of it a follower holds by now."""
    if table.resync_done < task.resync:
        table.resync_held_by, table.changes_pending = None, 0


def delay(table: VectorTable, instant: datetime) -> None:
    """After a task that failed: the longer the vector table is not true, the later it is tried again."""
    if table.resync_wanted > table.resync_done:
        since = instant - (table.last_sync_at or table.created_at)
        table.resync_not_before = instant + min(max(since / 2, _SHORTEST_DELAY), _LONGEST_DELAY)


@dataclass(frozen=True, slots=True)
class OwedSync:
    """A vector table to which a sync is owed that may begin now."""

    vector_table_id: str
    reason: str
    options: dict[str, Any]


def owed(session: Session, limit: int) -> list[OwedSync]:
    """Vector tables whose owed sync may begin: not held, not paused, without a live task, a built set there."""
    live_task = select(Task.id).where(Task.target_id == VectorTable.id, Task.status.in_(_LIVE)).exists()
    statement = (
        select(VectorTable.id, VectorTable.resync_reason, VectorTable.resync_options)
        .where(
            is_owed,
            VectorTable.resync_held_by.is_(None),
            VectorTable.live_version.is_not(None),
            VectorTable.deleted_at.is_(None),
            ~VectorTable.paused,
            may_sync,
            or_(
                VectorTable.resync_not_before.is_(None),
                VectorTable.resync_not_before <= func.clock_timestamp(),
            ),
            ~live_task,
        )
        .order_by(VectorTable.id)
        .limit(limit)
    )
    return [OwedSync(key, reason or "", dict(options)) for key, reason, options in session.execute(statement)]
