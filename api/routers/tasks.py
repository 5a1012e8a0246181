"""Tasks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from embedd_dagster.catalog import tasks
from embedd_dagster.errors import NotFound

from ..auth import Reader, Writer
from ..error_codes import error_responses
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, PageRequest, list_answer, text_filter
from ..schemas.base import TaskId
from ..schemas.tasks import TaskAnswer, TaskList, TaskStatusName
from ..strict_json import StrictRoute

router = APIRouter(prefix="/tasks", tags=["Tasks"], route_class=StrictRoute)

TargetId = Annotated[str | None, text_filter("Only tasks of this vector table")]
TargetName = Annotated[str | None, text_filter("Only tasks of the vector table with this name")]
WantedStatus = Annotated[TaskStatusName | None, Query(description="Only tasks with this status")]


@router.get("", responses=error_responses())
def list_tasks(
    caller: Reader,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
    target_id: TargetId = None,
    status: WantedStatus = None,
    name: TargetName = None,
) -> TaskList:
    """List tasks."""
    asked = PageRequest.read(limit, cursor, target_id=target_id, status=status, name=name)
    with caller.state.runtime.catalog.transaction() as session:
        page = tasks.page(
            session, caller.environment.id, limit, asked.after, target_id=target_id, status=status, name=name
        )
    return list_answer(TaskList, page, asked, TaskAnswer.of)


@router.get("/{task_id}", responses=error_responses("task_not_found"))
def get_task(task_id: TaskId, caller: Reader) -> TaskAnswer:
    """Get a task."""
    with caller.state.runtime.catalog.transaction() as session:
        return TaskAnswer.of(tasks.get(session, caller.environment.id, task_id))


@router.post("/{task_id}/cancel", responses=error_responses("permission_denied", "task_not_found"))
def cancel_task(task_id: TaskId, caller: Writer) -> TaskAnswer:
    """Cancel a task: a pending task ends at once, a running one when its run notices. A task that has ended stays as it is.

    A cancelled re-backfill does not start again by itself, only by `POST …/backfill` or by a change of the configuration.
    """
    with caller.state.runtime.catalog.transaction() as session:
        tasks.get(session, caller.environment.id, task_id)
        task = tasks.find(session, task_id, lock=True)
        if task is None:
            raise NotFound("task", task_id)
        tasks.request_cancel(session, task)
        run_id = task.dagster_run_id if task.cancel_requested else None
    if run_id is not None:
        caller.state.launcher.terminate(run_id)
    return TaskAnswer.of(task)
