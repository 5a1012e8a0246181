"""A vector table whose source table has another name now."""

from __future__ import annotations

from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from embedd_dagster.catalog import resyncs
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import Task, VectorSetRow, VectorTable
from embedd_dagster.catalog.vector_tables import request_build
from embedd_dagster.core.status import LIVE_TASK_STATUSES
from embedd_dagster.errors import Conflict

_LIVE_TASKS: Final = [status.value for status in LIVE_TASK_STATUSES]


def move(session: Session, row: VectorTable, source_table: str, key_type: str) -> None:
    """Reads from another source table from now on, such as one that was renamed. Raises Conflict while a task is live.

    What is live stays and is compared with the table by digests, in a sync that is asked for here. If that cannot be
    (nothing is live, another build is due or unfinished, the keys are of another type), a build begins instead.
    """
    if source_table == row.source_table:
        return
    # the caller has locked the vector table, as who creates a task does
    if session.scalar(select(Task.id).where(Task.target_id == row.id, Task.status.in_(_LIVE_TASKS))) is not None:
        raise Conflict(
            f"A task is at work on {row.name!r}: source_table can be changed when it has ended.",
            code="backfill_in_progress",
            resolution="Wait for the task, or cancel it with POST /v1/tasks/{id}/cancel.",
        )
    row.source_table = source_table
    row.updated_at = now()
    sets = session.scalars(select(VectorSetRow).where(VectorSetRow.vector_table_id == row.id)).all()
    current = [found for found in sets if found.version == row.live_version]
    is_unfinished = any(found.version > (row.live_version or 0) for found in sets)
    if (
        current
        and not is_unfinished
        and (current[0].config_version, current[0].key_type) == (row.config_version, key_type)
    ):
        current[0].configuration = {**current[0].configuration, "source_table": source_table}
        session.flush()
        resyncs.request(session, [row.id], "its source_table was changed")
        session.refresh(row)
        return
    request_build(row)
