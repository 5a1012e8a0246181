"""The sensor that removes what is no longer needed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import dagster as dg

from embedd_dagster.catalog import run_heartbeats
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.teardown import drop_deleted_tables, drop_retired_sets, drop_unused_streams
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError, EmbeddError

_INTERVAL_SECONDS = 2  # the daemon's loop makes it five
_CLEANUP_SECONDS = 20.0
_HEARTBEATS_KEPT = timedelta(hours=1)
_LONGEST_DELAY_SECONDS = 300.0
_SHOWN = 20


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
        for drop_all in (drop_deleted_tables, drop_unused_streams, drop_retired_sets):
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
