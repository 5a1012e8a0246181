"""What is shown of a vector table beyond its own row: rows without text, cut texts, and what its live task does."""

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
    """Of the build under way, otherwise of the live set; without either, zeros."""

    rows_skipped: int = 0
    rows_truncated: int = 0
    stage: str | None = None
    """What the live task does; None where there is none."""


def read(session: Session, vector_table_ids: Iterable[str]) -> dict[str, TableDetails]:
    """The details by id, in one statement."""
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
    stage = None if task is None else tasks.shown_stage(task)
    if task is not None and task.task_type in tasks.BUILDS:
        # total_rows and synced_rows are those of the build, too
        running = task.status == TaskStatus.RUNNING.value
        counted = task.progress if running else {}
        return TableDetails(counted.get("rows_skipped", 0), counted.get("rows_truncated", 0), stage)
    if live is None:
        return TableDetails(stage=stage)
    # a row that is cut again after each of its changes is one row
    return TableDetails(live.skipped_count or 0, min(live.truncated_count or 0, table.synced_rows), stage)
