"""One task from its claim to its end: what a Dagster run calls."""

from __future__ import annotations

import time
from collections.abc import Callable

from embedd_dagster.catalog import tasks
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.backfill import backfill
from embedd_dagster.engine.report import RunReport, report_on
from embedd_dagster.engine.retry import RetryPolicy
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.sync import sync
from embedd_dagster.engine.task_run import RunOptions, TaskRun
from embedd_dagster.errors import EmbeddError, RunCancelled, RunSuperseded, TransientError

_CATALOG_OUTAGE_SECONDS = 120.0
_DEFAULT_OPTIONS = RunOptions()


def run_task(
    runtime: Runtime,
    task_id: str,
    run_id: str,
    *,
    log: Callable[[str], None],
    should_stop: Callable[[], bool],
    options: RunOptions = _DEFAULT_OPTIONS,
) -> RunReport:
    """Claims the task for this run, does it, and ends it in the catalog; an error is raised again after that.

    A transient error puts the task back to pending while attempts are left. Raises RunSuperseded without having changed
    anything if the task belongs to another run; RunCancelled after the task was ended as cancelled.
    """
    try:
        with runtime.catalog.transaction() as session:
            task = tasks.claim(session, task_id, run_id)
    except RunCancelled as error:
        _end(runtime, task_id, run_id, error)
        raise
    begun = time.monotonic()
    try:
        with TaskRun(runtime, task, run_id, log=log, should_stop=should_stop, options=options) as run:
            counts = RowCounts()
            counts.add(sync(run) if task.task_type == TaskType.SYNC.value else backfill(run))
            counts.add(run.caught_up)
            run.context.retry(_complete, run)
            return report_on(run, counts, time.monotonic() - begun)
    except RunSuperseded:
        raise
    except BaseException as error:
        log(f"The run ends: {describe(error)}")
        _end(runtime, task_id, run_id, error)
        raise


def describe(error: BaseException) -> str:
    """An error for users: our own message, or only the type of another's, because its text may hold a row's content."""
    if isinstance(error, EmbeddError):
        return f"{error.message} {error.resolution}"
    return f"Internal error ({type(error).__name__}); the run's log has where it happened."


def _complete(run: TaskRun) -> None:
    with run.runtime.catalog.transaction() as session:
        tasks.complete(session, run.task.id, run.run_id, run.progress.to_json())


def _end(runtime: Runtime, task_id: str, run_id: str, error: BaseException) -> None:
    """Ends the task as failed or cancelled, if it is still this run's; retried while the catalog is down."""
    RetryPolicy(_CATALOG_OUTAGE_SECONDS)(_record_end, runtime, task_id, run_id, error)


def _record_end(runtime: Runtime, task_id: str, run_id: str, error: BaseException) -> None:
    with runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        if task is None or task.dagster_run_id != run_id or task.ended_at is not None:
            return
        # a bare interrupt means shutdown, not a user's cancellation: that arrives through `should_stop`
        asked_for = isinstance(error, RunCancelled) or task.cancel_requested
        if asked_for or _is_interrupt(error):
            reason = "The run was ended." if _is_interrupt(error) else describe(error)
            tasks.cancel(session, task, reason, asked_for=asked_for)
            return
        if isinstance(error, TransientError) and not error.is_attempt:
            tasks.hand_back(session, task, describe(error))
            return
        # unexpected exceptions are retried as well, because attempts are bounded
        is_permanent = isinstance(error, EmbeddError) and not isinstance(error, TransientError)
        message = describe(error)
        if isinstance(error, TransientError) and task.attempts >= task.max_attempts:
            message = f"{error.message} Tried {task.attempts} times: start it again once the cause is fixed."
        tasks.fail(session, task, message, retry=not is_permanent)


def _is_interrupt(error: BaseException) -> bool:
    # Dagster's DagsterExecutionInterruptedError is a BaseException; the engine does not know Dagster
    return not isinstance(error, Exception)
