"""Whether the process of a run is gone, judged by what both databases say of it. Pure.

Nothing is remembered from tick to tick: a code server that was restarted comes to the same answer at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

CODE_SERVER_STARTED_AT = datetime.now(UTC)
"""Runs are child processes of the code server, which is also the process that evaluates sensors: this one."""

SUBMISSION = timedelta(seconds=15)
"""A run is made a moment before it is queued. One that stays so lost the process that was queueing it, such as a webserver
whose connection to Dagster's database broke in between."""

START = timedelta(seconds=45)
"""A run process loads its code for some seconds before it gives its first heartbeat, longer on a busy machine."""


@dataclass(frozen=True, slots=True)
class LifeSigns:
    """When something was last heard of a run."""

    created_at: datetime | None = None
    changed_at: datetime | None = None
    """When Dagster last changed its record, as with each new status."""
    started_at: datetime | None = None
    """When its process said that the run begins."""
    heartbeat_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """The instant of the judgement, and how long a run may be silent."""

    now: datetime
    stale_after: timedelta
    code_server_started_at: datetime | None = None
    silence_counts: bool = True
    """False just after an outage of the catalog or of a sensor, when no run can have given a heartbeat."""


def why_gone(status: dg.DagsterRunStatus, signs: LifeSigns, silence_limits: SilenceLimits) -> str | None:
    """Why the process of a run in flight must be gone, or None where it may be alive."""
    match status:
        case dg.DagsterRunStatus.NOT_STARTED:
            if signs.created_at is not None and silence_limits.now - signs.created_at > SUBMISSION:
                return "It was made, and never put into the queue."
        case dg.DagsterRunStatus.STARTING:
            if _lost_its_code_server(signs, silence_limits):
                return "It did not start: the code server that was starting it is gone."
        case dg.DagsterRunStatus.STARTED | dg.DagsterRunStatus.CANCELING if silence_limits.silence_counts:
            return _why_silent(signs, silence_limits)
    return None


def _lost_its_code_server(signs: LifeSigns, silence_limits: SilenceLimits) -> bool:
    if signs.changed_at is None or silence_limits.code_server_started_at is None:
        return False
    return signs.changed_at < silence_limits.code_server_started_at and silence_limits.now - signs.changed_at > START


def _why_silent(signs: LifeSigns, silence_limits: SilenceLimits) -> str | None:
    if signs.heartbeat_at is not None:
        if silence_limits.now - signs.heartbeat_at <= silence_limits.stale_after:
            return None
        return f"It has given no heartbeat since {signs.heartbeat_at:%Y-%m-%d %H:%M:%S} UTC; its process is gone."
    known = [instant for instant in (signs.created_at, signs.changed_at, signs.started_at) if instant is not None]
    if not known or silence_limits.now - max(known) <= max(START, silence_limits.stale_after):
        return None
    return "It has never given a heartbeat; its process is gone."
