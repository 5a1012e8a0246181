"""The sensor that keeps one CDC consumer alive for each connection."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import dagster as dg

from embedd_dagster.catalog import cdc, run_heartbeats
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.defs.cdc.job import follow_job
from embedd_dagster.defs.cdc.plan import ConsumerRun, Launch, plan_consumers
from embedd_dagster.defs.liveness import CODE_SERVER_STARTED_AT
from embedd_dagster.defs.reconcile.observe import Memory, life_signs
from embedd_dagster.defs.reconcile.plan import IN_FLIGHT
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tags import CONNECTION_TAG
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError

_INTERVAL_SECONDS = 2
_LAUNCHES_PER_TICK = 25
"""The daemon launches about ten runs per second, and ticks again only when all are launched."""
_SECONDS_PER_TICK = 10.0
"""Of the sixty that Dagster waits for a tick; after that, all its launches are lost."""

_memory = Memory()


@dg.sensor(
    job=follow_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps one run of `follow_job` alive for each connection with cdc vector tables, and renews it in time.",
)
def follower_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SensorResult | dg.SkipReason:
    """Level-triggered, like `reconcile_sensor`; it talks to no source."""
    return keep_consuming(context.instance, runtime.open, _memory, tick_log(context))


def keep_consuming(
    instance: dg.DagsterInstance,
    open_runtime: Callable[[], Runtime],
    memory: Memory,
    log: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dg.SensorResult | dg.SkipReason:
    """One tick."""
    until = clock() + _SECONDS_PER_TICK
    runs = _runs_in_flight(instance)
    try:
        runtime = open_runtime()
        with runtime.catalog.transaction() as session:
            instant = database_now(session)
            connection_ids = cdc.connections_with_cdc(session)
            streams = {stream.connection_id: stream for stream in cdc.all_streams(session)}
            heartbeats = run_heartbeats.latest(session, [run.run_id for run in runs])
    except (CatalogUnavailable, ConfigurationError) as error:
        memory.note_failure(time.monotonic())
        return dg.SkipReason(f"{error.message} {error.resolution}")
    settings, seen_at = runtime.settings, time.monotonic()
    memory.note_read(seen_at, settings.stale_after_seconds / 2)
    runs = [replace(run, signs=replace(run.signs, heartbeat_at=heartbeats.get(run.run_id))) for run in runs]
    planned = plan_consumers(
        connection_ids,
        streams,
        runs,
        instant,
        stale_after=timedelta(seconds=settings.stale_after_seconds),
        renew_after=timedelta(seconds=settings.follow_renew_seconds),
        silence_counts=memory.has_watched_for(seen_at, settings.stale_after_seconds),
        code_server_started_at=CODE_SERVER_STARTED_AT,
    )
    requests = [_request(instance, launch) for launch in planned.launches[:_LAUNCHES_PER_TICK]]
    for run in planned.dead:
        if clock() >= until:
            log("There are more runs without a process: the next tick goes on.")
            break
        _mark_run_failed(instance, run, log)
    return (
        dg.SensorResult(run_requests=requests)
        if requests
        else dg.SkipReason("Every CDC connection has a running consumer.")
    )


def _runs_in_flight(instance: dg.DagsterInstance) -> list[ConsumerRun]:
    wanted = dg.RunsFilter(job_name=follow_job.name, statuses=sorted(IN_FLIGHT, key=lambda status: status.value))
    return [
        ConsumerRun(record.dagster_run.run_id, connection_id, record.dagster_run.status, life_signs(record))
        for record in instance.get_run_records(wanted)
        if (connection_id := record.dagster_run.tags.get(CONNECTION_TAG)) is not None
    ]


def _mark_run_failed(instance: dg.DagsterInstance, run: ConsumerRun, log: Callable[[str], None]) -> None:
    """Ends a run in Dagster whose process is gone; should it live after all, it finds that its stream is another's."""
    found = instance.get_run_by_id(run.run_id)
    if found is not None and found.status in IN_FLIGHT:
        instance.report_run_failed(found, message="It has given no heartbeat; its process is gone.")
        log(f"{run.connection_id}: run {run.run_id} is gone.")


def _request(instance: dg.DagsterInstance, launch: Launch) -> dg.RunRequest:
    behind = launch.behind
    if behind is None:
        last = instance.get_run_records(
            dg.RunsFilter(job_name=follow_job.name, tags={CONNECTION_TAG: launch.connection_id}), limit=1
        )
        behind = last[0].dagster_run.run_id if last else f"first {int(time.time())}"
    return dg.RunRequest(
        # one run behind each: the same key on a tick that is repeated
        run_key=f"{launch.connection_id} behind {behind}",
        tags={CONNECTION_TAG: launch.connection_id},
        run_config={"ops": {"follow_changes": {"config": {"connection_id": launch.connection_id}}}},
    )
