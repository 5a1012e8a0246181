"""Vector tables that wait for something: a build, a sync, a place in the schedule, or their removal."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.tables import Task, VectorTable
from embedd_dagster.core.status import LIVE_TASK_STATUSES, SyncStatus

_LIVE = tuple(status.value for status in LIVE_TASK_STATUSES)
_is_rebuild_suppressed = VectorTable.not_rebuilt_version.is_not_distinct_from(VectorTable.config_version)
may_sync = or_(
    VectorTable.sync_status.in_([SyncStatus.SYNCED.value, SyncStatus.ERROR.value]),
    and_(VectorTable.sync_status == SyncStatus.PENDING_REBACKFILL.value, _is_rebuild_suppressed),
)
"""The condition that no build comes first, so that the live vectors are kept in sync."""


def never_built(session: Session, vector_table_ids: Collection[str]) -> set[str]:
    """Those of these that have no live set: there is nothing to sync."""
    statement = select(VectorTable.id).where(VectorTable.id.in_(vector_table_ids), VectorTable.live_version.is_(None))
    return set(session.scalars(statement))


def awaiting_rebackfill(session: Session) -> list[VectorTable]:
    """Vector tables whose configuration is newer than the live one, except paused ones and cancelled builds."""
    wanted = SyncStatus.PENDING_REBACKFILL.value
    return list(session.scalars(select(VectorTable).where(VectorTable.sync_status == wanted, ~_is_rebuild_suppressed)))


def being_deleted(session: Session) -> list[VectorTable]:
    """Vector tables whose storage is still to be torn down."""
    return list(session.scalars(select(VectorTable).where(VectorTable.sync_status == SyncStatus.DELETING.value)))


def due_for_sync(session: Session, instant: datetime, limit: int = 1000) -> list[VectorTable]:
    """Tables whose next sync has come, the longest due first.

    Without paused ones, those never built, and those with a live task: they are due until that has ended.
    """
    statement = (
        select(VectorTable)
        .where(
            VectorTable.next_sync_at <= instant,
            may_sync,
            VectorTable.live_version.is_not(None),
            ~has_live_task(),
        )
        .order_by(VectorTable.next_sync_at)
        .limit(limit)
    )
    return list(session.scalars(statement))


def has_live_task() -> ColumnElement[bool]:
    """The condition that a task of the vector table is pending or running."""
    return select(Task.id).where(Task.target_id == VectorTable.id, Task.status.in_(_LIVE)).exists()


def without_next_sync(session: Session, limit: int = 1000) -> list[VectorTable]:
    """Tables that are live and not yet on the schedule: newly built ones, and those whose schedule was changed."""
    statement = (
        select(VectorTable)
        .where(
            VectorTable.next_sync_at.is_(None),
            VectorTable.live_version.is_not(None),
            VectorTable.deleted_at.is_(None),
        )
        .limit(limit)
    )
    return list(session.scalars(statement))
