"""When vector tables sync: those whose next sync has come get a task, which `reconcile_sensor` launches.

Batch tables sync by a schedule of their own or the default one; cdc tables are followed, and compared once a day.

A sensor looks for them. Dagster's timeline shows each future tick of a schedule as a run, and nearly all ticks find nothing.
"""

from collections.abc import Callable
from datetime import UTC, datetime

import dagster as dg
from croniter import CroniterError, croniter  # type: ignore[import-untyped]
from sqlalchemy.orm import Session

from embedd_dagster.catalog import due_tables, tasks, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import VectorTable
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import SyncMode
from embedd_dagster.defs.jobs import vector_table_job
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError, Conflict
from embedd_dagster.settings import Settings

_INTERVAL_SECONDS = 15  # a cron is due on a minute: so late a sync begins at most, and as much later as a tick takes
_LIVE_TASKS = 500  # so many may wait for a run; the others stay due, so that a backfill never stands behind thousands


@dg.sensor(
    name="sync_sensor",
    job=vector_table_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts the syncs that are due: of vector tables whose own schedule (`sync_schedule`, a cron in UTC) has come.",
)
def sync_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SkipReason:
    """Creates the tasks that are due. It goes by the clock, not by the tick, so that after a pause one sync follows."""
    return schedule_syncs(runtime.open, now(), tick_log(context))


def schedule_syncs(open_runtime: Callable[[], Runtime], instant: datetime, log: Callable[[str], None]) -> dg.SkipReason:
    """One tick; launching is `reconcile_sensor`'s alone, so it tells what it did as its reason."""
    try:
        runtime = open_runtime()
        with runtime.catalog.transaction() as session:
            for table in due_tables.without_next_sync(session):
                _set_next_sync(table, instant, runtime.settings, log)
            room = max(0, _LIVE_TASKS - len(tasks.live_tasks(session)))
            due = [table.id for table in due_tables.due_for_sync(session, instant, limit=room)]
        begun = [key for key in due if _begin_sync(runtime, key, instant, log)]
    except (CatalogUnavailable, ConfigurationError) as error:
        return dg.SkipReason(f"{error.message} {error.resolution}")
    return dg.SkipReason(f"{len(begun)} syncs begin: {', '.join(begun[:20])}." if begun else "No sync is due.")


def _begin_sync(runtime: Runtime, vector_table_id: str, instant: datetime, log: Callable[[str], None]) -> bool:
    try:
        with runtime.catalog.transaction() as session:
            return _create_sync(session, runtime, vector_table_id, instant, log)
    except Conflict:
        return False  # a task came in between: it stays due until that has ended


def _create_sync(
    session: Session, runtime: Runtime, vector_table_id: str, instant: datetime, log: Callable[[str], None]
) -> bool:
    table = vector_tables.find(session, vector_table_id, lock=True)
    if table is None or table.deleted_at is not None or table.paused:
        return False
    if not _set_next_sync(table, instant, runtime.settings, log):
        return False
    tasks.create(session, table, TaskType.SYNC, max_attempts=runtime.settings.max_task_attempts)
    return True


def _set_next_sync(table: VectorTable, instant: datetime, settings: Settings, log: Callable[[str], None]) -> bool:
    is_cdc = table.sync_mode == SyncMode.CDC.value
    schedule = table.sync_schedule or (settings.cdc_sync_schedule if is_cdc else settings.sync_schedule)
    try:
        table.next_sync_at = next_sync_at(schedule, instant)
    except CroniterError:
        log(f"{table.id}: {schedule!r} is not a cron schedule; it does not sync by itself.")
        return False
    return True


def next_sync_at(schedule: str, instant: datetime) -> datetime:
    """The first time of a cron schedule after an instant, in UTC. Raises CroniterError."""
    following: datetime = croniter(schedule, instant.astimezone(UTC)).get_next(datetime)
    return following
