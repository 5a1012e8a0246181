"""Row counts of a vector table as callers see them, and what its live task is doing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.tables import Task, VectorSetRow, VectorTable
from embedd_dagster.core.status import LIVE_TASK_STATUSES, TaskStatus

_LIVE = tuple(status.value for status in LIVE_TASK_STATUSES)


@dataclass(frozen=True, slots=True)
class TableDetails:
    """Counts of the build that is under way, otherwise of the live set."""

    total_rows: int = 0
    synced_rows: int = 0
    rows_skipped: int = 0
    rows_truncated: int = 0
    stage: str | None = None
    """What the live task is doing; None if there is none."""


def read(session: Session, vector_table_ids: Iterable[str]) -> dict[str, TableDetails]:
    """The details by vector table id, in one statement."""
    statement = (
        select(VectorTable, VectorSetRow, Task)
        .outerjoin(
            VectorSetRow,
            and_(VectorSetRow.vector_table_id == VectorTable.id, VectorSetRow.version == VectorTable.live_version),
        )
        .outerjoin(Task, and_(Task.target_id == VectorTable.id, Task.status.in_(_LIVE)))
        .where(VectorTable.id.in_(list(vector_table_ids)))
    )
    return {table.id: _details(table, live, task) for table, live, task in session.execute(statement)}


def _details(table: VectorTable, live: VectorSetRow | None, task: Task | None) -> TableDetails:
    if task is not None and task.task_type in tasks.BUILDS:
        return _build_details(table, task)
    stage = None if task is None else tasks.shown_stage(task)
    if live is None:
        return TableDetails(table.total_rows, table.synced_rows, stage=stage)
    # a row that is cut again after each of its changes is one row
    truncated = min(live.truncated_count or 0, table.synced_rows)
    return TableDetails(table.total_rows, table.synced_rows, live.skipped_count or 0, truncated, stage)


def _build_details(table: VectorTable, task: Task) -> TableDetails:
    done = task.progress
    # until the run has counted the rows, the last count is shown
    total = done.get("total_rows", 0) or (table.total_rows if done.get("stage") is None else 0)
    counted = done if task.status == TaskStatus.RUNNING.value else {}
    return TableDetails(
        total,
        done.get("rows_processed", 0),
        counted.get("rows_skipped", 0),
        counted.get("rows_truncated", 0),
        tasks.shown_stage(task),
    )
