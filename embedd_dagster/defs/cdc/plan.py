"""Which CDC consumers are launched, and which are marked as failed. Pure: facts in, a plan out; no clock and no I/O."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import dagster as dg

from embedd_dagster.catalog.tables import CdcStreamRow
from embedd_dagster.defs.liveness import LifeSigns, SilenceLimits, why_gone


@dataclass(frozen=True, slots=True)
class ConsumerRun:
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
class ConsumerPlan:
    """What is to be done this tick."""

    launches: tuple[Launch, ...] = ()
    dead: tuple[ConsumerRun, ...] = ()


def plan_consumers(
    connection_ids: Iterable[str],
    streams: Mapping[str, CdcStreamRow],
    runs: Sequence[ConsumerRun],
    instant: datetime,
    *,
    stale_after: timedelta,
    renew_after: timedelta,
    silence_counts: bool = True,
    code_server_started_at: datetime | None = None,
) -> ConsumerPlan:
    """One living run for each connection that is to be followed; a second one where the first is to be renewed. Pure.

    Runs of connections that are not to be followed any more end by themselves, and so do those that were replaced: until
    then, they say by the heartbeat of the run that their process is alive. Where silence does not count, because the catalog
    was away until just now, a run that gives heartbeats is taken to live.
    """
    silence_limits = SilenceLimits(instant, stale_after, code_server_started_at, silence_counts)
    dead = tuple(run for run in runs if _is_dead(run, streams.get(run.connection_id), silence_limits))
    launches = []
    for connection_id in sorted(connection_ids):
        stream = streams.get(connection_id)
        alive = [run for run in runs if run.connection_id == connection_id and run not in dead]
        if not alive:
            if stream is None or stream.next_start_at is None or stream.next_start_at <= instant:
                launches.append(Launch(connection_id))
        elif len(alive) == 1 and stream is not None and _is_to_renew(alive[0], stream, instant - renew_after):
            launches.append(Launch(connection_id, behind=alive[0].run_id))
    return ConsumerPlan(tuple(launches), dead)


def _is_to_renew(run: ConsumerRun, stream: CdcStreamRow, before: datetime) -> bool:
    return stream.dagster_run_id == run.run_id and stream.claimed_at is not None and stream.claimed_at <= before


def _is_dead(run: ConsumerRun, stream: CdcStreamRow | None, silence_limits: SilenceLimits) -> bool:
    if stream is not None and stream.dagster_run_id == run.run_id and stream.heartbeat_at is not None:
        return silence_limits.silence_counts and silence_limits.now - stream.heartbeat_at > silence_limits.stale_after
    return why_gone(run.status, run.signs, silence_limits) is not None
