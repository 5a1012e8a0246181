"""What watches the catalog. Level-triggered, without cursors: what one tick misses, the next one sees."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import dagster as dg

from embedd_dagster.catalog import run_heartbeats
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.defs.jobs import vector_table_job
from embedd_dagster.defs.partitions import vector_tables as partitions
from embedd_dagster.defs.reconcile.apply import Enactor
from embedd_dagster.defs.reconcile.observe import Memory, observe
from embedd_dagster.defs.reconcile.plan import Limits, Plan, Verdict, plan
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.teardown import drop_deleted_tables, drop_retired_sets, drop_unused_feeds
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError, EmbeddError

_INTERVAL_SECONDS = 2  # the daemon's own loop makes it five
_RECONCILE_SECONDS = 10.0  # of a tick's sixty; launches wait for the end of the tick
_CLEANUP_SECONDS = 20.0
_HEARTBEATS_KEPT = timedelta(hours=1)
_LONGEST_DELAY_SECONDS = 300.0
_SHOWN = 20

_memory = Memory()


@dg.sensor(
    job=vector_table_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Makes Dagster what the catalog says: partitions are the vector tables, a task without a run gets one, a task "
        "whose run died is queued again, a configuration newer than what is live is built."
    ),
)
def reconcile_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SensorResult | dg.SkipReason:
    """Observe, plan, enact; the decisions are in `reconcile`. Never talks to a source or a store."""
    return reconcile(context.instance, runtime.open, _memory, tick_log(context))


def reconcile(
    instance: dg.DagsterInstance,
    open_runtime: Callable[[], Runtime],
    memory: Memory,
    log: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dg.SensorResult | dg.SkipReason:
    """One tick."""
    until = clock() + _RECONCILE_SECONDS
    try:
        runtime = open_runtime()
        limits = Limits(stale_after=timedelta(seconds=runtime.settings.stale_after_seconds))
        enactor = Enactor(instance, runtime, log, until, clock)
        seen = observe(instance, runtime, memory)
        planned = plan(seen, limits)
        requests = enactor.enact(planned, seen.places)
        requeued = {decision.task.task_id for decision in planned.tasks if decision.verdict is Verdict.REQUEUE}
        if requeued and clock() < until:  # they are judged once more: the next tick is five seconds away
            seen = observe(instance, runtime, memory)
            launches = [one for one in plan(seen, limits).tasks if one.verdict is Verdict.LAUNCH]
            chosen = tuple(one for one in launches if one.task.task_id in requeued)
            requests += enactor.enact(Plan(tasks=chosen), seen.places)
        moved = enactor.move_partitions(planned)
    except (CatalogUnavailable, ConfigurationError) as error:
        memory.note_failure(time.monotonic())
        return dg.SkipReason(f"{error.message} {error.resolution}")
    changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if planned.partitions_to_add:
        changes.append(partitions.build_add_request(list(planned.partitions_to_add)))
    to_delete = [key for key in planned.partitions_to_delete if key in moved or key not in planned.partitions_to_move]
    if to_delete:
        changes.append(partitions.build_delete_request(to_delete))
    if not requests and not changes:
        return dg.SkipReason("The catalog and Dagster agree.")
    return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=changes)


@dataclass(slots=True)
class Delays:
    """When to try again what failed: doubling, kept in memory only."""

    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    def is_due(self, name: str, instant: float) -> bool:
        """Whether it may be tried."""
        return instant >= self._failures.get(name, (0, 0.0))[1]

    def note(self, name: str, instant: float, *, succeeded: bool) -> None:
        """Remembers how a try went."""
        if succeeded:
            self._failures.pop(name, None)
            return
        count = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = (count, instant + min(2.0**count, _LONGEST_DELAY_SECONDS))


_delays = Delays()


@dg.sensor(
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Drops what nobody needs: the storage of deleted vector tables, and sets that were replaced.",
)
def cleanup_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SkipReason:
    """Apart from `reconcile_sensor`, since a store that hangs must not keep runs from being launched."""
    return clean_up(runtime.open, _delays, tick_log(context))


def clean_up(open_runtime: Callable[[], Runtime], delays: Delays, log: Callable[[str], None]) -> dg.SkipReason:
    """One tick; it launches nothing, so it tells what it did as its reason."""
    turn = CleanupTurn(delays, log, until=time.monotonic() + _CLEANUP_SECONDS)
    try:
        runtime = open_runtime()
        with runtime.catalog.transaction() as session:
            run_heartbeats.forget(session, database_now(session) - _HEARTBEATS_KEPT)
        for drop_all in (drop_deleted_tables, drop_unused_feeds, drop_retired_sets):
            drop_all(runtime, turn.attempt)
    except (CatalogUnavailable, ConfigurationError) as error:
        return dg.SkipReason(f"{error.message} {error.resolution}")
    shown, more = turn.dropped[:_SHOWN], len(turn.dropped) - _SHOWN
    told = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    return dg.SkipReason(f"Dropped {told}." if told else "Nothing to drop.")


@dataclass(slots=True)
class CleanupTurn:
    """What may be tried in one tick: within its time, what is due, and where something fails nothing else of that place."""

    delays: Delays
    log: Callable[[str], None]
    until: float
    dropped: list[str] = field(default_factory=list)
    _failed_places: set[str] = field(default_factory=set)

    def attempt(self, what: str, place: str, drop: Callable[[], bool]) -> bool:
        """Whether it was tried now, and dropped. What fails is tried again later, and does not stop the others."""
        begun = time.monotonic()
        if begun > self.until or place in self._failed_places or not self.delays.is_due(what, begun):
            return False
        try:
            dropped = drop()
        except Exception as error:  # noqa: BLE001 - one store must not stop the others
            told = f"{error.message} {error.resolution}" if isinstance(error, EmbeddError) else type(error).__name__
            self.log(f"{what}: {told}")
            self.delays.note(what, time.monotonic(), succeeded=False)
            self._failed_places.add(place)
            return False
        self.delays.note(what, time.monotonic(), succeeded=True)
        if dropped:
            self.dropped.append(what)
        return dropped
