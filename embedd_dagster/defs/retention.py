"""Forgetting what is old: Dagster itself keeps every run and its events for ever, and the catalog its tasks.

Kept beyond their time are the runs that say what is there now (the latest materialization of each partition), those of
live tasks, and all that are not embedd's alone.
"""

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Final

import dagster as dg
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionsFilter, PartitionBackfill
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.storage.runs.schema import BackfillTagsTable, BulkActionsTable
from sqlalchemy import delete, select

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.clock import now
from embedd_dagster.core.run_names import JOB_NAME, TASK_TAG
from embedd_dagster.defs.backfills import ASSET_KEY
from embedd_dagster.defs.cdc.job import follow_job
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.partitions import vector_tables
from embedd_dagster.defs.reconcile.plan import IN_FLIGHT
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tick_logs import purge_tick_logs
from embedd_dagster.defs.verdicts import CHECK_NAME, FORMER_CHECK_NAMES
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import ConfigurationError

_PURGE_JOB: Final = "purge_job"
_UI_JOB: Final = "__ASSET_JOB"  # of what is materialized by a click, and by conditions; also of other people's assets
_JOB_NAMES: Final = (JOB_NAME, follow_job.name, _PURGE_JOB, _UI_JOB)
_ENDED: Final = [status for status in dg.DagsterRunStatus if status not in IN_FLIGHT]
_RUNS_AT_ONCE: Final = 500
_TASKS_AT_ONCE: Final = 5_000
_LONGEST_SECONDS: Final = 3600.0


@dg.op(description="Deletes old runs with their events and logs, then the records of old tasks.")
def purge_old_runs(context: dg.OpExecutionContext, runtime: RuntimeResource) -> None:
    """One purge, by `EMBEDD_RUN_RETENTION_DAYS`; what it does not get done in an hour is left for the next."""
    try:
        opened = runtime.open()
        days = opened.settings.run_retention_days
        if days == 0:
            context.log.info("EMBEDD_RUN_RETENTION_DAYS is 0: everything is kept.")
            return
        before = now() - timedelta(days=days)
        begun = time.monotonic()
        runs = purge_runs(context.instance, opened, before, context.log.info)
        backfills = purge_backfills(context.instance, before)
        files = purge_tick_logs(context.instance, lambda: time.monotonic() - begun > _LONGEST_SECONDS)
        forgotten = purge_tasks(opened, before)
    except Exception as error:  # noqa: BLE001 - every error is translated, so that no row's content is shown
        raise as_failure(error) from None
    context.log.info("Deleted %s runs and %s tasks that ended before %s.", runs, forgotten, before)
    context.log.info("Deleted %s backfills of that time, and the log files of %s old ticks.", backfills, files)
    context.add_output_metadata({"runs_deleted": runs, "tasks_deleted": forgotten, "tick_logs_deleted": files})


@dg.job(
    name=_PURGE_JOB,
    executor_def=dg.in_process_executor,
    description="Forgets runs and tasks that are older than EMBEDD_RUN_RETENTION_DAYS.",
)
def purge_job() -> None:
    """The job of the purge."""
    purge_old_runs()


@dg.schedule(
    name="purge_schedule",
    job=purge_job,
    cron_schedule="17 3 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every night: what is older than EMBEDD_RUN_RETENTION_DAYS is forgotten.",
)
def purge_schedule(runtime: RuntimeResource) -> dg.RunRequest | dg.SkipReason:
    """A run a night, none where everything is kept."""
    try:
        days = runtime.open().settings.run_retention_days
    except ConfigurationError as error:
        return dg.SkipReason(f"{error.message} {error.resolution}")
    return dg.RunRequest() if days else dg.SkipReason("EMBEDD_RUN_RETENTION_DAYS is 0: everything is kept.")


def purge_runs(instance: dg.DagsterInstance, runtime: Runtime, before: datetime, log: Callable[[str], None]) -> int:
    """Deletes the runs that ended before and say nothing of the present; how many."""
    # what ends or begins from here on is not old: nothing deleted below can become needed meanwhile
    with runtime.catalog.transaction() as session:
        live = {task.id for task in tasks.live_tasks(session)}
    telling = _latest_materializing_runs(instance)
    begun = time.monotonic()
    deleted = 0
    for page in _pages(instance, before):
        old = [
            run.run_id
            for run in page
            if _is_ours_alone(run) and run.run_id not in telling and run.tags.get(TASK_TAG) not in live
        ]
        for run_id in old:
            # the files first: nobody finds them once the run is gone
            instance.compute_log_manager.delete_logs(prefix=[run_id])
            instance.delete_run(run_id)
        _delete_verdicts(instance, old)
        deleted += len(old)
        if time.monotonic() - begun > _LONGEST_SECONDS:
            log("There is more to delete: the next purge goes on.")
            break
    return deleted


def _delete_verdicts(instance: dg.DagsterInstance, run_ids: list[str]) -> None:
    """Deletes what these runs have said of asset checks, except the latest of each check and partition.

    Dagster leaves it behind, a sixth of what a run takes, and has no call for it: hence its own table.
    """
    storage = instance.event_log_storage
    if not run_ids or not isinstance(storage, SqlEventLogStorage):
        return
    verdicts, later = AssetCheckExecutionsTable, AssetCheckExecutionsTable.alias()
    has_later = select(later.c.id).where(
        later.c.asset_key == verdicts.c.asset_key,
        later.c.check_name == verdicts.c.check_name,
        later.c.partition.is_not_distinct_from(verdicts.c.partition),
        later.c.id > verdicts.c.id,
    )
    of_these = (
        verdicts.c.asset_key == ASSET_KEY.to_string(),
        verdicts.c.check_name.in_([CHECK_NAME, *FORMER_CHECK_NAMES]),
        verdicts.c.run_id.in_(run_ids),
    )
    with storage.index_connection() as connection:
        connection.execute(delete(verdicts).where(*of_these, has_later.exists()))


def purge_backfills(instance: dg.DagsterInstance, before: datetime) -> int:
    """Deletes the records of vector tables' backfills that were asked for before, and have ended; how many.

    Dagster keeps them for ever, and has no call for it: hence its own tables.
    """
    storage = instance.run_storage
    if not isinstance(storage, SqlRunStorage):
        return 0
    ended = BulkActionsFilter(statuses=BULK_ACTION_TERMINAL_STATUSES, created_before=before)
    deleted, page = 0, instance.get_backfills(filters=ended, limit=_RUNS_AT_ONCE)
    while page:
        old = [backfill.backfill_id for backfill in page if _makes_vector_tables_alone(backfill)]
        following = instance.get_backfills(filters=ended, cursor=page[-1].backfill_id, limit=_RUNS_AT_ONCE)
        for backfill_id in old:
            instance.compute_log_manager.delete_logs(prefix=["backfill", backfill_id])
        with storage.connect() as connection:
            connection.execute(delete(BackfillTagsTable).where(BackfillTagsTable.c.backfill_id.in_(old)))
            connection.execute(delete(BulkActionsTable).where(BulkActionsTable.c.key.in_(old)))
        deleted, page = deleted + len(old), following
    return deleted


def _makes_vector_tables_alone(backfill: PartitionBackfill) -> bool:
    return backfill.job_name == JOB_NAME or set(backfill.asset_selection or ()) == {ASSET_KEY}


def _pages(instance: dg.DagsterInstance, before: datetime) -> Iterator[list[dg.DagsterRun]]:
    """Ended runs of these jobs that nothing has happened to since, oldest first."""

    def read(job_name: str, cursor: str | None) -> list[dg.DagsterRun]:
        # narrowed by when it was last changed, which an index serves, and then by when it ended
        runs_filter = dg.RunsFilter(job_name=job_name, statuses=_ENDED, updated_before=before)
        records = instance.get_run_records(runs_filter, limit=_RUNS_AT_ONCE, cursor=cursor, ascending=True)
        return [record.dagster_run for record in records]

    for job_name in _JOB_NAMES:
        page = read(job_name, None)
        while page:
            following = read(job_name, page[-1].run_id)  # before the run that it begins behind is deleted
            yield page
            page = following


def _is_ours_alone(run: dg.DagsterRun) -> bool:
    """False for a run that has made other assets too, or only those."""
    selection = run.asset_selection or frozenset()  # of a job that selects all it has: empty
    return selection == {ASSET_KEY} or (run.job_name != _UI_JOB and not selection)


def _latest_materializing_runs(instance: dg.DagsterInstance) -> set[str]:
    """The runs to which the present vector tables owe their latest materialization: it would go with the run."""
    present = set(instance.get_dynamic_partitions(vector_tables.name or ""))
    latest = instance.event_log_storage.get_latest_storage_id_by_partition(
        ASSET_KEY, dg.DagsterEventType.ASSET_MATERIALIZATION, present
    )
    storage_ids = sorted(latest.values())
    runs: set[str] = set()
    for start in range(0, len(storage_ids), _RUNS_AT_ONCE):
        some = storage_ids[start : start + _RUNS_AT_ONCE]
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=ASSET_KEY, storage_ids=some), limit=_RUNS_AT_ONCE
        )
        runs.update(record.run_id for record in found.records)
    return runs


def purge_tasks(runtime: Runtime, before: datetime) -> int:
    """Removes the records of tasks that ended before; how many."""
    forgotten = 0
    while True:
        with runtime.catalog.transaction() as session:
            some = tasks.forget_ended(session, before, _TASKS_AT_ONCE)
        forgotten += some
        if some < _TASKS_AT_ONCE:
            return forgotten
