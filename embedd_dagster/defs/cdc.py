"""Change capture in Dagster: one long-lived run a connection, and the sensor that keeps it alive.

The run writes one materialization a vector table and minute at most, with what it applied and how far it is behind.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import dagster as dg
from pydantic import Field

from embedd_dagster.catalog import change_feeds, run_heartbeats
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.catalog.tables import ChangeFeed
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.liveness import CODE_SERVER_STARTED_AT, LifeSigns, Patience, why_gone
from embedd_dagster.defs.materialization import Links, describe_follow_report
from embedd_dagster.defs.reconcile.observe import Memory, life_signs
from embedd_dagster.defs.reconcile.plan import IN_FLIGHT
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.stopping import told_to_stop
from embedd_dagster.defs.tags import CONNECTION_TAG
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.cdc.consumer import run_consumer
from embedd_dagster.engine.cdc.report import CdcReport
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError

_INTERVAL_SECONDS = 2
_LAUNCHES_PER_TICK = 25
"""The daemon launches some ten runs a second, and only then ticks again."""
_SECONDS_PER_TICK = 10.0
"""Of the sixty that Dagster waits for a tick, after which all its launches would be lost."""

_memory = Memory()


class FollowConfig(dg.Config):
    """Whose log is followed."""

    connection_id: str = Field(description="A connection with vector tables of sync_mode `cdc`")


@dg.op(
    description="Applies what the source's log says has changed, until it is asked to end or another run takes over."
)
def follow_changes(context: dg.OpExecutionContext, config: FollowConfig, runtime: RuntimeResource) -> None:
    """One run of the follower; what ends it well is in its log."""
    try:
        opened = runtime.open()

        def report(done: CdcReport) -> None:
            context.log_event(
                dg.AssetMaterialization(
                    asset_key="vector_table",
                    partition=done.partition_key,
                    description="Changes that were captured in the source's log",
                    metadata=describe_follow_report(done, Links.of(opened.settings)),
                )
            )

        with heartbeat(opened, context.run_id, context.log.info), told_to_stop() as should_stop:
            reason = run_consumer(
                opened,
                config.connection_id,
                context.run_id,
                log=context.log.info,
                report=report,
                should_stop=should_stop,
            )
    except Exception as error:  # noqa: BLE001 - every error is translated, so that no row's content is shown
        raise as_failure(error) from None
    context.log.info(reason)
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
        raise dg.DagsterExecutionInterruptedError


@dg.job(
    executor_def=dg.in_process_executor,
    description="Follows one connection's log for its cdc vector tables. Kept alive by `follower_sensor`.",
)
def follow_job() -> None:
    """The job of the followers."""
    follow_changes()


@dataclass(frozen=True, slots=True)
class FollowerRun:
    """A run of the job that is queued or at work."""

    run_id: str
    connection_id: str
    status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED
    signs: LifeSigns = field(default_factory=LifeSigns)


@dataclass(frozen=True, slots=True)
class Launch:
    """A run to be launched for a connection, behind the one named (None: behind the last one)."""

    connection_id: str
    behind: str | None = None


@dataclass(frozen=True, slots=True)
class FollowerPlan:
    """What is to be done this tick."""

    launches: tuple[Launch, ...] = ()
    dead: tuple[FollowerRun, ...] = ()


def plan_followers(
    to_follow: Iterable[str],
    feeds: Mapping[str, ChangeFeed],
    runs: Sequence[FollowerRun],
    instant: datetime,
    *,
    stale_after: timedelta,
    renew_after: timedelta,
    silence_counts: bool = True,
    code_server_started_at: datetime | None = None,
) -> FollowerPlan:
    """One living run for each connection that is to be followed; a second one where the first is to be renewed. Pure.

    Runs of connections that are not to be followed any more end by themselves, and so do those that were replaced: until
    then, they say by the heartbeat of the run that their process is alive. Where silence does not count, because the catalog
    was away until just now, a run that gives heartbeats is taken to live.
    """
    patience = Patience(instant, stale_after, code_server_started_at, silence_counts)
    dead = tuple(run for run in runs if _is_dead(run, feeds.get(run.connection_id), patience))
    launches = []
    for connection_id in sorted(to_follow):
        feed = feeds.get(connection_id)
        alive = [run for run in runs if run.connection_id == connection_id and run not in dead]
        if not alive:
            if feed is None or feed.next_start_at is None or feed.next_start_at <= instant:
                launches.append(Launch(connection_id))
        elif len(alive) == 1 and feed is not None and _is_to_renew(alive[0], feed, instant - renew_after):
            launches.append(Launch(connection_id, behind=alive[0].run_id))
    return FollowerPlan(tuple(launches), dead)


def _is_to_renew(run: FollowerRun, feed: ChangeFeed, before: datetime) -> bool:
    return feed.dagster_run_id == run.run_id and feed.claimed_at is not None and feed.claimed_at <= before


def _is_dead(run: FollowerRun, feed: ChangeFeed | None, patience: Patience) -> bool:
    if feed is not None and feed.dagster_run_id == run.run_id and feed.heartbeat_at is not None:
        return patience.silence_counts and patience.now - feed.heartbeat_at > patience.stale_after
    return why_gone(run.status, run.signs, patience) is not None


@dg.sensor(
    job=follow_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps one run of `follow_job` alive for each connection with cdc vector tables, and renews it in time.",
)
def follower_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SensorResult | dg.SkipReason:
    """Level-triggered, like `reconcile_sensor`; it talks to no source."""
    return keep_following(context.instance, runtime.open, _memory, tick_log(context))


def keep_following(
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
            to_follow = change_feeds.connections_to_follow(session)
            feeds = {feed.connection_id: feed for feed in change_feeds.all_feeds(session)}
            heartbeats = run_heartbeats.latest(session, [run.run_id for run in runs])
    except (CatalogUnavailable, ConfigurationError) as error:
        memory.note_failure(time.monotonic())
        return dg.SkipReason(f"{error.message} {error.resolution}")
    settings, seen_at = runtime.settings, time.monotonic()
    memory.note_read(seen_at, settings.stale_after_seconds / 2)
    runs = [replace(run, signs=replace(run.signs, heartbeat_at=heartbeats.get(run.run_id))) for run in runs]
    planned = plan_followers(
        to_follow,
        feeds,
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
        _bury(instance, run, log)
    return dg.SensorResult(run_requests=requests) if requests else dg.SkipReason("Whatever is to be followed is.")


def _runs_in_flight(instance: dg.DagsterInstance) -> list[FollowerRun]:
    wanted = dg.RunsFilter(job_name=follow_job.name, statuses=sorted(IN_FLIGHT, key=lambda status: status.value))
    return [
        FollowerRun(record.dagster_run.run_id, connection_id, record.dagster_run.status, life_signs(record))
        for record in instance.get_run_records(wanted)
        if (connection_id := record.dagster_run.tags.get(CONNECTION_TAG)) is not None
    ]


def _bury(instance: dg.DagsterInstance, run: FollowerRun, log: Callable[[str], None]) -> None:
    """Ends a run in Dagster whose process is gone; should it live after all, it finds that its feed is another's."""
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
