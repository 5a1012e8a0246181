"""Which waiting work gets a run next. Pure.

The catalog is the queue, and Dagster's is kept short: what stands in Dagster's queue is first come, first served. So each
environment has a few runs there at most, and the one with the fewest comes next.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, TypeVar

from embedd_dagster.core.fairness import QueuePlace

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """Something that waits for a run."""

    subject: S
    place: QueuePlace
    small: bool
    since: datetime


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """How far the launches may be ahead of the slots, in one lane."""

    queued: int
    """So many runs may wait in Dagster's queue. An environment that has none in flight gets one all the same."""
    per_environment: int
    """So many runs of one environment may be in flight, queued or at work."""


@dataclass(slots=True)
class Lane:
    """What is in flight in one lane."""

    limits: LaneLimits
    queued: int = 0
    by_environment: Counter[str] = field(default_factory=Counter)
    by_organization: Counter[str] = field(default_factory=Counter)

    def add(self, place: QueuePlace, *, queued: bool) -> None:
        """Counts a run in flight."""
        self.queued += queued
        self.by_environment[place.environment_id] += 1
        self.by_organization[place.org_id] += 1

    def has_room_for(self, place: QueuePlace) -> bool:
        """Whether another run may be launched for this environment."""
        in_flight = self.by_environment[place.environment_id]
        if in_flight == 0:
            return True
        return self.queued < self.limits.queued and in_flight < self.limits.per_environment


def choose(candidates: Iterable[Candidate[S]], small: Lane, large: Lane, limit: int) -> list[S]:
    """What to launch, in this order: the small lane first, and in each lane the environments in turn, oldest first."""
    ordered = sorted(candidates, key=lambda candidate: candidate.since)
    chosen = _choose_in_lane([candidate for candidate in ordered if candidate.small], small, limit)
    rest = [candidate for candidate in ordered if not candidate.small]
    return chosen + _choose_in_lane(rest, large, limit - len(chosen))


def _choose_in_lane(candidates: Sequence[Candidate[S]], lane: Lane, limit: int) -> list[S]:
    waiting: dict[str, deque[Candidate[S]]] = defaultdict(deque)
    for candidate in candidates:
        waiting[candidate.place.environment_id].append(candidate)
    chosen: list[S] = []
    while len(chosen) < limit:
        first = [queue[0] for queue in waiting.values() if queue and lane.has_room_for(queue[0].place)]
        if not first:
            break
        following = min(first, key=lambda candidate: _turn(candidate, lane))
        waiting[following.place.environment_id].popleft()
        lane.add(following.place, queued=True)
        chosen.append(following.subject)
    return chosen


def _turn(candidate: Candidate[S], lane: Lane) -> tuple[int, int, datetime]:
    place = candidate.place
    return lane.by_organization[place.org_id], lane.by_environment[place.environment_id], candidate.since
