"""How the installation is, in numbers: one query each, over all organizations, without ids and names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy import BigInteger, ColumnElement, case, extract, func, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog import resyncs
from embedd_dagster.catalog.tables import CdcState, CdcStreamRow, FailedRow, Task, VectorTable
from embedd_dagster.core import ids
from embedd_dagster.core.status import LIVE_TASK_STATUSES

_QUANTILES: Final = {"0.5": 0.5, "0.95": 0.95, "1": 1.0}
_WINDOW_SECONDS: Final = 24 * 3600
_LIVE: Final = tuple(status.value for status in LIVE_TASK_STATUSES)


@dataclass(frozen=True, slots=True)
class TaskSums:
    """What some tasks have done together."""

    tasks: int
    rows_processed: int
    rows_failed: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """The numbers of one moment."""

    vector_tables: dict[str, int]
    """By sync_status."""
    live_tasks: dict[tuple[str, str], int]
    """By task type and status."""
    staleness_seconds: dict[str, float]
    """By quantile; empty where nothing is live."""
    failed_rows: dict[str, int]
    """By the step that failed, of live sets."""
    log_lag_bytes: int
    """How much of its log the source keeps that keeps most for us."""
    changes_pending: int
    """Changes that were read and are not yet applied."""
    ended_tasks: dict[tuple[str, str], TaskSums]
    """By task type and status, of the tasks made in the last 24 hours."""


def read(session: Session) -> Statistics:
    """The numbers of now."""
    by_status = select(VectorTable.sync_status, func.count()).group_by(VectorTable.sync_status)
    live = (
        select(Task.task_type, Task.status, func.count())
        .where(Task.status.in_(_LIVE))
        .group_by(Task.task_type, Task.status)
    )
    failed = (
        select(FailedRow.step, func.count())
        .join(
            VectorTable,
            (VectorTable.id == FailedRow.vector_table_id) & (VectorTable.live_version == FailedRow.version),
        )
        .group_by(FailedRow.step)
    )
    return Statistics(
        vector_tables=dict(session.execute(by_status).all()),
        live_tasks={(task_type, status): number for task_type, status, number in session.execute(live)},
        staleness_seconds=_staleness(session),
        failed_rows=dict(session.execute(failed).all()),
        log_lag_bytes=int(session.scalar(select(func.max(CdcStreamRow.lag_bytes))) or 0),
        changes_pending=int(session.scalar(select(func.sum(CdcState.changes_pending)).where(resyncs.is_pending)) or 0),
        ended_tasks=_ended_tasks(session),
    )


def _staleness(session: Session) -> dict[str, float]:
    subscribed = (CdcStreamRow.caught_up_at > CdcState.subscribed_since) & ~resyncs.is_pending
    fresh_as_of = case(
        (subscribed, func.greatest(VectorTable.last_sync_at, CdcStreamRow.caught_up_at)), else_=VectorTable.last_sync_at
    )
    age = extract("epoch", func.clock_timestamp() - fresh_as_of)
    statement = (
        select(*(func.percentile_disc(fraction).within_group(age.asc()) for fraction in _QUANTILES.values()))
        .select_from(VectorTable)
        .join(CdcState, CdcState.vector_table_id == VectorTable.id)
        .outerjoin(CdcStreamRow, CdcStreamRow.connection_id == VectorTable.connection_id)
    ).where(VectorTable.live_version.is_not(None), VectorTable.deleted_at.is_(None), ~VectorTable.paused)
    found = session.execute(statement).one()
    return {
        quantile: max(0.0, float(seconds))
        for quantile, seconds in zip(_QUANTILES, found, strict=True)
        if seconds is not None
    }


def _ended_tasks(session: Session) -> dict[tuple[str, str], TaskSums]:
    # ids begin with the second of their making, so the primary key's index serves the window
    since = ids.new_id("task", int(time.time()) - _WINDOW_SECONDS)
    statement = (
        select(Task.task_type, Task.status, func.count(), _sum("rows_processed"), _sum("rows_failed"), _sum("tokens"))
        .where(Task.id >= since, Task.ended_at.is_not(None))
        .group_by(Task.task_type, Task.status)
    )
    return {
        (task_type, status): TaskSums(int(tasks), int(processed), int(failed), int(tokens))
        for task_type, status, tasks, processed, failed, tokens in session.execute(statement)
    }


def _sum(name: str) -> ColumnElement[int]:
    return func.coalesce(func.sum(Task.progress[name].astext.cast(BigInteger)), 0)
