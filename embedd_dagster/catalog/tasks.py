"""Tasks: the outbox of run launches, who owns them, and how they end.

A task is live while `pending` or `running`; a partial unique index allows one live task a vector table. A run *claims*
its task by compare-and-set; from then on every write it makes is fenced: it fails with RunSuperseded once the task is
another run's, or nobody's.

Who changes a live task and its vector table in one transaction takes the task first: the other order would be a deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from embedd_dagster.catalog import resyncs, vector_tables
from embedd_dagster.catalog.clock import database_now, new_id, now
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.tables import CdcState, Task, VectorTable
from embedd_dagster.core import ids
from embedd_dagster.core.counts import RowCounts, progress_to_json
from embedd_dagster.core.status import LIVE_TASK_STATUSES, TASK_STATUS_MOVES, TaskStatus, TaskType
from embedd_dagster.errors import Conflict, EmbeddError, NotFound, RunCancelled, RunSuperseded

_LIVE = tuple(status.value for status in LIVE_TASK_STATUSES)
BUILDS = (TaskType.BACKFILL.value, TaskType.REBACKFILL.value)

EMPTY_PROGRESS = progress_to_json(RowCounts())


def create(
    session: Session,
    table: VectorTable,
    task_type: TaskType,
    *,
    max_attempts: int,
    total_rows: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """A pending task; a backfill moves its vector table to `backfilling`. Raises Conflict `backfill_in_progress`."""
    if live := find_live(session, table.id):  # inserting would tell as well, but wait for whoever changes that one
        raise _already_live(table, live)
    task = Task(
        id=new_id("task"),
        org_id=table.org_id,
        environment_id=table.environment_id,
        target_id=table.id,
        task_type=task_type.value,
        status=TaskStatus.PENDING.value,
        progress={**EMPTY_PROGRESS, "total_rows": total_rows},
        options=dict(options or {}),
        attempts=0,
        max_attempts=max_attempts,
        cancel_requested=False,
        created_at=database_now(session),  # of whichever process: what is later must look later
    )
    try:
        with session.begin_nested():
            session.add(task)
            session.flush()
    except IntegrityError:
        raise _already_live(table, find_live(session, table.id)) from None
    if task.task_type in BUILDS:
        vector_tables.begin_build(table)
    return task


def _already_live(table: VectorTable, live: Task | None) -> Conflict:
    doing = "sync" if live is not None and live.task_type == TaskType.SYNC.value else "backfill"
    return Conflict(
        f"A {doing} of {table.name!r} is queued or running" + (f" (task {live.id})." if live else "."),
        code="backfill_in_progress",
        resolution="Wait for it, or cancel it with POST /v1/tasks/{id}/cancel.",
    )


def get(session: Session, environment_id: str, task_id: str) -> Task:
    """The task. Raises NotFound, also for one of another environment."""
    task = session.get(Task, task_id)
    if task is None or task.environment_id != environment_id:
        raise NotFound("task", task_id)
    return task


def find(session: Session, task_id: str, *, lock: bool = False) -> Task | None:
    """The task of any environment, or None."""
    return session.get(Task, task_id, with_for_update=lock or None, populate_existing=lock)


def find_live(session: Session, vector_table_id: str, *, lock: bool = False) -> Task | None:
    """The live task of a vector table, or None."""
    statement = select(Task).where(Task.target_id == vector_table_id, Task.status.in_(_LIVE))
    return session.scalar(statement.with_for_update() if lock else statement)


def page(
    session: Session,
    environment_id: str,
    limit: int,
    after: Position | None,
    *,
    target_id: str | None,
    status: str | None,
    name: str | None = None,
) -> Page[Task]:
    """The environment's tasks, newest first; with a name, those of the vector table that has it now."""
    statement = select(Task).where(Task.environment_id == environment_id)
    if name is not None:
        named = select(VectorTable.id).where(
            VectorTable.environment_id == environment_id, VectorTable.name == name, VectorTable.deleted_at.is_(None)
        )
        statement = statement.where(Task.target_id == named.scalar_subquery())
    return fetch_page(session, having(statement, {Task.target_id: target_id, Task.status: status}), Task, limit, after)


def live_tasks(session: Session) -> list[Task]:
    """Every task that is pending or running, oldest first."""
    return list(session.scalars(select(Task).where(Task.status.in_(_LIVE)).order_by(Task.created_at)))


def targets_begun_since(session: Session, since: Mapping[str, datetime], *, builds: bool) -> set[str]:
    """Of these vector tables, those for which a task was created since; of builds only, where `builds`."""
    if not since:
        return set()
    statement = select(Task.target_id, func.max(Task.created_at)).where(Task.target_id.in_(since))
    if builds:
        statement = statement.where(Task.task_type.in_(BUILDS))
    newest = session.execute(statement.group_by(Task.target_id))
    return {target_id for target_id, created_at in newest if created_at >= since[target_id]}


def count_waiting(session: Session, environment_id: str) -> int:
    """How many tasks of the environment wait to begin."""
    statement = select(func.count()).where(Task.status == TaskStatus.PENDING.value)
    return session.scalar(statement.where(Task.environment_id == environment_id)) or 0


def forget_ended(session: Session, before: datetime, limit: int) -> int:
    """Removes some of the tasks that ended before; how many. Fewer than `limit` are all."""
    # ids begin with the second of their making, so the primary key's index finds the old ones
    old = select(Task.id).where(Task.id < ids.new_id("task", int(before.timestamp())), Task.ended_at < before)
    forgotten = session.scalars(delete(Task).where(Task.id.in_(old.order_by(Task.id).limit(limit))).returning(Task.id))
    return len(forgotten.all())


def shown_stage(task: Task) -> str | None:
    """What the task does now: `queued` while no run has claimed it. None once it is completed."""
    if task.status == TaskStatus.PENDING.value:
        return "queued"
    if task.status == TaskStatus.COMPLETED.value:
        return None
    stage: str | None = task.progress.get("stage")
    return "starting" if stage is None and task.status == TaskStatus.RUNNING.value else stage


def record_launch(session: Session, task_id: str, run_id: str) -> None:
    """Notes that a run was launched for a pending task: the sensor need not launch another until that one is dead."""
    session.execute(
        update(Task)
        .where(Task.id == task_id, Task.status == TaskStatus.PENDING.value)
        .values(launched_at=func.now(), dagster_run_id=run_id)
    )


def claim(session: Session, task_id: str, run_id: str) -> Task:
    """Makes the run the owner of a pending task; idempotent for the same run.

    Raises RunSuperseded where the task is another run's or has ended, RunCancelled where it was asked to end.
    """
    task = session.get(Task, task_id, with_for_update=True, populate_existing=True)
    if task is None:
        raise RunSuperseded(f"Task {task_id} does not exist (any more).")
    if task.status == TaskStatus.RUNNING.value and task.dagster_run_id == run_id:
        return task
    if task.status != TaskStatus.PENDING.value:
        raise RunSuperseded(f"Task {task_id} is {task.status} already; this run does not own it.")
    if task.cancel_requested:
        raise RunCancelled("The task was cancelled before it began.")
    _move(task, TaskStatus.RUNNING)
    task.dagster_run_id = run_id
    # each attempt compares with the source of its own time, and builds what is configured then
    wanted = (
        select(CdcState.resync_requested_seq, VectorTable.config_version)
        .join(VectorTable, VectorTable.id == CdcState.vector_table_id)
        .where(VectorTable.id == task.target_id)
    )
    # locked, so that every later request for a resync sees that this task is running
    found = session.execute(wanted.with_for_update(read=True)).one_or_none()
    task.resync, task.config_version = found or (0, None)
    task.attempts += 1
    task.started_at = task.started_at or now()
    task.heartbeat_at = now()
    return task


def assert_owner(session: Session, task_id: str, run_id: str) -> None:
    """Fences the present transaction: returns only while this run owns the task. Raises RunSuperseded, RunCancelled."""
    found = session.execute(
        select(Task.cancel_requested)
        .where(Task.id == task_id, Task.dagster_run_id == run_id, Task.status == TaskStatus.RUNNING.value)
        .with_for_update(read=True)
    ).one_or_none()
    if found is None:
        raise RunSuperseded(f"Run {run_id} does not own task {task_id} any more.")
    if found.cancel_requested:
        raise RunCancelled("The task was cancelled.")


def heartbeat(session: Session, task_id: str, run_id: str, progress: Mapping[str, Any]) -> None:
    """Says that the run is alive, and how far it is. Raises RunSuperseded, RunCancelled."""
    changed = session.execute(
        update(Task)
        .where(Task.id == task_id, Task.dagster_run_id == run_id, Task.status == TaskStatus.RUNNING.value)
        .values(heartbeat_at=func.clock_timestamp(), progress=dict(progress))
        .returning(Task.cancel_requested)
    ).one_or_none()
    if changed is None:
        raise RunSuperseded(f"Run {run_id} does not own task {task_id} any more.")
    if changed.cancel_requested:
        raise RunCancelled("The task was cancelled.")


def complete(session: Session, task_id: str, run_id: str, progress: Mapping[str, Any]) -> None:
    """Ends the run's task well; the vector table comes to rest. Raises RunSuperseded."""
    task = _owned(session, task_id, run_id)
    _move(task, TaskStatus.COMPLETED)
    task.progress = dict(progress)
    task.last_error = None
    task.ended_at = now()
    table = vector_tables.find(session, task.target_id, lock=True)
    if table is not None and table.deleted_at is None:
        vector_tables.clear_error(table)
        resyncs.complete(table.cdc, task)
        vector_tables.settle_status(table)


def _owned(session: Session, task_id: str, run_id: str) -> Task:
    task = session.get(Task, task_id, with_for_update=True, populate_existing=True)
    if task is None or task.dagster_run_id != run_id or task.status != TaskStatus.RUNNING.value:
        raise RunSuperseded(f"Run {run_id} does not own task {task_id} any more.")
    return task


def fail(session: Session, task: Task, error: str, *, retry: bool) -> None:
    """Ends a live task badly, or puts it back to pending where `retry` is asked for and attempts are left.

    The last error of the vector table is set either way. When the task is given up, the status becomes `error`, but a paused
    table stays so until it is resumed, and a sync that failed does not keep a newer configuration from being built.
    """
    task.last_error = error
    table = vector_tables.find(session, task.target_id, lock=True)
    if retry and task.attempts < task.max_attempts and not task.cancel_requested:
        if task.status == TaskStatus.RUNNING.value:
            _move(task, TaskStatus.PENDING)
        task.dagster_run_id = task.launched_at = task.heartbeat_at = task.config_version = None
        if table is not None:
            table.last_error, table.last_error_at = error, now()
        return
    _move(task, TaskStatus.FAILED)
    task.ended_at = now()
    if table is not None and table.deleted_at is None:
        _keep_row_estimate(table, task)
        resyncs.requeue(table.cdc, task)
        resyncs.postpone(table, now())
        vector_tables.settle_failure(table, error, TaskType(task.task_type))


def hand_back(session: Session, task: Task, reason: str) -> None:
    """Puts a running task back to pending, where its run ended through no fault of the task: it costs no attempt."""
    task.attempts -= 1
    task.handed_back += 1
    fail(session, task, reason, retry=True)


def cancel(session: Session, task: Task, reason: str = "Cancelled.", *, asked_for: bool = True) -> None:
    """Ends a live task as cancelled; the vector table goes back to what it was.

    A build that somebody asked to end is not begun again by itself: that would go on spending their money.
    """
    _move(task, TaskStatus.CANCELLED)
    task.last_error = reason
    task.ended_at = now()
    table = vector_tables.find(session, task.target_id, lock=True)
    if table is not None and table.deleted_at is None:
        _keep_row_estimate(table, task)
        resyncs.requeue(table.cdc, task)
        if task.task_type in BUILDS:  # a sync has not changed the status
            if asked_for:
                vector_tables.suppress_rebuild(session, table, task.config_version or table.config_version)
            vector_tables.settle_status(table)


def _keep_row_estimate(table: VectorTable, task: Task) -> None:
    """Keeps how many rows the source has, for a vector table of which nothing is live."""
    if table.live_version is None:
        table.total_rows = task.progress["total_rows"] or table.total_rows


def request_cancel(session: Session, task: Task) -> None:
    """Asks a live task to end: a pending one ends at once, a running one when its run notices. Idempotent."""
    if task.status == TaskStatus.PENDING.value and task.dagster_run_id is None:
        cancel(session, task)
    elif task.status in _LIVE:
        task.cancel_requested = True


def _move(task: Task, status: TaskStatus) -> None:
    present = TaskStatus(task.status)
    if status not in TASK_STATUS_MOVES[present]:
        raise EmbeddError(f"A task does not go from {present} to {status}.")
    task.status = status.value
