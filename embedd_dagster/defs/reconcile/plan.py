"""What is to be done where the catalog and Dagster disagree. Pure: facts in, a plan out; no clock and no I/O.

The catalog says what should be, and which run owns which task. A run is only a means: one that owns nothing may end, a
task without a run gets one. Every decision follows from the facts of this tick alone, so nothing can be missed, and what
was decided twice is harmless because it is checked again under a lock when it is carried out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TypeAlias

import dagster as dg

from embedd_dagster.catalog.resyncs import PendingResync
from embedd_dagster.core.fairness import QueuePlace, is_small
from embedd_dagster.core.status import TaskStatus, TaskType
from embedd_dagster.defs.backfills import GivenUpWork
from embedd_dagster.defs.fair import Candidate, Lane, LaneLimits, choose
from embedd_dagster.defs.liveness import LifeSigns, SilenceLimits, why_gone

IN_FLIGHT = frozenset(
    {
        dg.DagsterRunStatus.QUEUED,
        dg.DagsterRunStatus.NOT_STARTED,
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    }
)
_WAITING = frozenset({dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED})


@dataclass(frozen=True, slots=True)
class TaskFact:
    """A live task, as the catalog has it."""

    task_id: str
    vector_table_id: str
    task_type: TaskType
    status: TaskStatus
    attempts: int
    max_attempts: int
    cancel_requested: bool
    created_at: datetime
    handed_back: int = 0
    """Claims that were given back without being attempts."""
    run_id: str | None = None
    """While running, the owner; while pending, the run that the API has launched, if it did."""
    heartbeat_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunFact:
    """A run of the asset, as Dagster has it.

    CANCELED means that somebody asked for it, except `given_up`: Dagster ends a run whose process was told to stop as
    FAILURE.
    """

    run_id: str
    status: dg.DagsterRunStatus
    task_id: str | None = None
    partition_key: str | None = None
    ended_at: datetime | None = None
    signs: LifeSigns = field(default_factory=LifeSigns)
    backfill_id: str | None = None
    given_up: bool = False
    """Dagster gave up the backfill that the run is part of, and cancelled it for that reason alone."""

    @property
    def was_cancelled_by_somebody(self) -> bool:
        """Whether somebody wanted it to end."""
        return self.status in (dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.CANCELING) and not self.given_up


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Both sides at one instant. Runs are read before tasks: a queued run whose task is not there has lost it."""

    now: datetime
    wanted_partitions: Mapping[str, str]
    """The partition keys of the vector tables that are not being deleted, by id."""
    awaiting_rebackfill: tuple[str, ...] = ()
    pending_resyncs: tuple[PendingResync, ...] = ()
    tasks: tuple[TaskFact, ...] = ()
    partition_keys: frozenset[str] = frozenset()
    runs_in_flight: tuple[RunFact, ...] = ()
    runs_ended: Mapping[str, Sequence[RunFact]] = field(default_factory=dict)
    """By task, oldest first; known only for tasks that have no run in flight."""
    places: Mapping[str, QueuePlace] = field(default_factory=dict)
    """By vector table, of those that have a live task or wait for one."""
    targeted_keys: frozenset[str] = frozenset()
    """Partitions of backfills that go on in Dagster."""
    given_up: tuple[GivenUpWork, ...] = ()
    """What a backfill that Dagster gave up was still to do, and nobody has begun since."""
    cancelled_alone: tuple[str, ...] = ()
    """Runs that somebody cancelled while their backfill went on, and that are not marked so yet."""
    code_server_started_at: datetime | None = None
    silence_counts: bool = True
    """False just after an outage of the catalog or of this sensor, when no run can have given a heartbeat."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient, and how much at once."""

    stale_after: timedelta
    launch_grace: timedelta = timedelta(seconds=3)
    """The API launches a task's run itself, a moment after it has committed the task."""
    retry_delay: timedelta = timedelta(seconds=30)
    """Before the third attempt, and as much more before each further one; the second comes at once."""
    requests_per_tick: int = 25
    """The daemon launches some ten runs a second, and only then ticks again."""
    small: LaneLimits = field(default_factory=lambda: LaneLimits(queued=10, per_environment=10))
    large: LaneLimits = field(default_factory=lambda: LaneLimits(queued=10, per_environment=8))
    deletions_per_tick: int = 100
    """The daemon deletes partitions one by one, and only then ticks again."""


class Decision(StrEnum):
    """What becomes of a live task."""

    LAUNCH = "launch"
    REQUEUE = "requeue"
    GIVE_UP = "give_up"
    CANCEL = "cancel"
    ASK_TO_END = "ask_to_end"


@dataclass(frozen=True, slots=True)
class TaskDecision:
    """What becomes of a task, and of runs that go with it."""

    task: TaskFact
    action: Decision
    reason: str
    run_key: str | None = None
    ends: RunDecision | None = None
    is_attempt: bool = True
    """Whether a claim that is taken back counts as an attempt of the task."""


@dataclass(frozen=True, slots=True)
class RunDecision:
    """A run to be ended: as cancelled where somebody wanted that, as failed where its process is gone."""

    run_id: str
    cancelled: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is to be done this tick."""

    partitions_to_add: tuple[str, ...] = ()
    partitions_to_delete: tuple[str, ...] = ()
    partitions_to_move: Mapping[str, str] = field(default_factory=dict)
    """Of those to delete, the ones that were named by an id, with the key under which their history belongs now."""
    rebackfills: tuple[str, ...] = ()
    syncs: tuple[PendingResync, ...] = ()
    given_up: tuple[GivenUpWork, ...] = ()
    tasks: tuple[TaskDecision, ...] = ()
    runs: tuple[RunDecision, ...] = ()
    cancelled_alone: tuple[str, ...] = ()


def plan(snapshot: Snapshot, limits: Limits) -> Plan:
    """What brings Dagster and the catalog together; empty where they agree."""
    in_flight = _by_task(snapshot.runs_in_flight)
    judged = [decide_task(task, in_flight.get(task.task_id, ()), snapshot, limits) for task in snapshot.tasks]
    decisions = [decision for decision in judged if decision is not None]
    launches = _choose_launches(snapshot, decisions, limits)
    settled = [one for one in decisions if one.action is not Decision.LAUNCH]
    to_add, to_delete, to_move = _change_partitions(snapshot, limits)
    return Plan(
        partitions_to_add=to_add,
        partitions_to_delete=to_delete,
        partitions_to_move=to_move,
        rebackfills=tuple(one for one in launches if isinstance(one, str)),
        syncs=tuple(one for one in launches if isinstance(one, PendingResync)),
        given_up=tuple(one for one in launches if isinstance(one, GivenUpWork)),
        tasks=(*settled, *(one for one in launches if isinstance(one, TaskDecision))),
        runs=tuple(decide_runs(snapshot, settled, limits)),
        cancelled_alone=snapshot.cancelled_alone,
    )


Launchable: TypeAlias = TaskDecision | str | PendingResync | GivenUpWork


def _choose_launches(snapshot: Snapshot, decisions: Sequence[TaskDecision], limits: Limits) -> list[Launchable]:
    """Of all that waits for a run, what gets one at this tick."""
    candidates: list[Candidate[Launchable]] = []

    def add(subject: Launchable, vector_table_id: str, task_type: TaskType, since: datetime) -> None:
        place = snapshot.places.get(vector_table_id, QueuePlace())
        candidates.append(Candidate(subject, place, is_small(task_type, place), since))

    for decision in decisions:
        if decision.action is Decision.LAUNCH:
            task = decision.task
            add(decision, task.vector_table_id, task.task_type, task.created_at)
    busy = {task.vector_table_id for task in snapshot.tasks}
    for vector_table_id in snapshot.awaiting_rebackfill:
        if vector_table_id not in busy and vector_table_id in snapshot.wanted_partitions:
            add(vector_table_id, vector_table_id, TaskType.REBACKFILL, snapshot.now)
    for resync in snapshot.pending_resyncs:
        add(resync, resync.vector_table_id, TaskType.SYNC, snapshot.now)
    for work in snapshot.given_up:
        if work.vector_table_id not in busy and work.vector_table_id in snapshot.wanted_partitions:
            add(work, work.vector_table_id, TaskType.SYNC if work.is_sync else TaskType.BACKFILL, work.requested_at)
    small, large = _lanes(snapshot, limits)
    return choose(candidates, small, large, limits.requests_per_tick)


def _lanes(snapshot: Snapshot, limits: Limits) -> tuple[Lane, Lane]:
    small, large = Lane(limits.small), Lane(limits.large)
    tasks = {task.task_id: task for task in snapshot.tasks}
    for run in snapshot.runs_in_flight:
        task = tasks.get(run.task_id or "")
        if task is not None and not (run.status in _WAITING and _why_unwanted(task, snapshot)):
            place = snapshot.places.get(task.vector_table_id, QueuePlace())
            lane = small if is_small(task.task_type, place) else large
            lane.add(place, queued=run.status in _WAITING)
    return small, large


def _change_partitions(snapshot: Snapshot, limits: Limits) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """(keys to add, keys to delete, of these the ones whose history is moved first and where to), as far as a tick goes."""
    in_use = {run.partition_key for run in snapshot.runs_in_flight} | snapshot.targeted_keys
    to_add, unwanted = partition_changes(snapshot.wanted_partitions.values(), snapshot.partition_keys, in_use)
    former = [key for key in unwanted if key in snapshot.wanted_partitions]
    later = set(former[limits.requests_per_tick :])
    to_delete = tuple(key for key in unwanted if key not in later)[: limits.deletions_per_tick]
    return (
        to_add,
        to_delete,
        {key: snapshot.wanted_partitions[key] for key in to_delete if key in snapshot.wanted_partitions},
    )


def partition_changes(
    wanted: Iterable[str], existing: Iterable[str], in_use: Iterable[str | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys to add, keys to delete), sorted; a key in use, by a run in flight or a backfill, is deleted once that has ended.

    A run whose partition is deleted under it fails when it stores what it made; a backfill is given up with all its runs.
    """
    wanted, existing = set(wanted), set(existing)
    return tuple(sorted(wanted - existing)), tuple(sorted(existing - wanted - set(in_use)))


def decide_task(
    task: TaskFact, in_flight: Sequence[RunFact], snapshot: Snapshot, limits: Limits
) -> TaskDecision | None:
    """What becomes of one live task, given its runs in flight; None where all is well, or it is too early to say."""
    if task.status is TaskStatus.PENDING:
        return _decide_pending(task, in_flight, snapshot, limits)
    return _decide_running(task, in_flight, snapshot, limits)


def _decide_pending(
    task: TaskFact, in_flight: Sequence[RunFact], snapshot: Snapshot, limits: Limits
) -> TaskDecision | None:
    unwanted = _why_unwanted(task, snapshot)
    if unwanted:
        return TaskDecision(task, Decision.CANCEL, unwanted)
    if in_flight:
        return None
    ended = snapshot.runs_ended.get(task.task_id, ())
    if not ended:
        early = snapshot.now - task.created_at < limits.launch_grace
        return None if early else _launch(task, ended, "No run was launched for the task yet.")
    return _decide_after_runs(task, ended, snapshot, limits)


def _decide_after_runs(
    task: TaskFact, ended: Sequence[RunFact], snapshot: Snapshot, limits: Limits
) -> TaskDecision | None:
    latest = ended[-1]
    if latest.status in IN_FLIGHT:
        return None  # launched since the runs in flight were read
    if latest.was_cancelled_by_somebody:
        return TaskDecision(task, Decision.CANCEL, f"Run {latest.run_id} was cancelled in Dagster before it began.")
    failures = sum(run.status is dg.DagsterRunStatus.FAILURE for run in ended)
    never_began = failures - task.attempts - task.handed_back
    if never_began >= task.max_attempts:
        return TaskDecision(
            task,
            Decision.GIVE_UP,
            f"{never_began} runs ended before they could begin the task; see run {latest.run_id} in the Dagster UI.",
        )
    delay = limits.retry_delay * max(0, max(task.attempts, failures - task.handed_back) - 1)
    if latest.ended_at is not None and snapshot.now - latest.ended_at < delay:
        return None
    return _launch(task, ended, f"Run {latest.run_id} has ended ({latest.status.value}) and the task is still to do.")


def _launch(task: TaskFact, ended: Sequence[RunFact], reason: str) -> TaskDecision:
    # Dagster launches nothing for a key that one of its runs has. The latest run makes it: the same on a tick that is
    # repeated, another for the next attempt, and never one that is taken, even if somebody has deleted runs: a run
    # that has it is itself later than the run it names
    return TaskDecision(task, Decision.LAUNCH, reason, run_key=f"{task.task_id}:{ended[-1].run_id if ended else 0}")


def _decide_running(
    task: TaskFact, in_flight: Sequence[RunFact], snapshot: Snapshot, limits: Limits
) -> TaskDecision | None:
    unwanted = _why_unwanted(task, snapshot)
    owner = next((run for run in in_flight if run.run_id == task.run_id), None)
    if owner is None:
        ended = snapshot.runs_ended.get(task.task_id, ())
        owner = next((run for run in ended if run.run_id == task.run_id), None)
    last_seen = task.heartbeat_at or task.created_at
    silent = snapshot.silence_counts and snapshot.now - last_seen > limits.stale_after
    if owner is not None and owner.status not in IN_FLIGHT:
        if owner.was_cancelled_by_somebody or unwanted:
            return TaskDecision(task, Decision.CANCEL, unwanted or f"Run {owner.run_id} was cancelled in Dagster.")
        if owner.given_up:
            reason = f"Dagster gave up backfill {owner.backfill_id} and cancelled run {owner.run_id} with it."
        else:
            reason = f"Run {owner.run_id} ended ({owner.status.value}) without finishing the task."
        return TaskDecision(task, Decision.REQUEUE, reason, is_attempt=not owner.given_up)
    if silent:
        reason = (
            f"Run {task.run_id} has given no heartbeat since {last_seen:%Y-%m-%d %H:%M:%S} UTC; its process is gone."
        )
        wanted_to_end = unwanted or (owner is not None and owner.was_cancelled_by_somebody)
        decision = Decision.CANCEL if wanted_to_end else Decision.REQUEUE
        ends = None if owner is None else RunDecision(owner.run_id, decision is Decision.CANCEL, reason)
        is_attempt = owner is None or not owner.given_up
        return TaskDecision(task, decision, unwanted or reason, ends=ends, is_attempt=is_attempt)
    if unwanted and not task.cancel_requested:
        return TaskDecision(task, Decision.ASK_TO_END, unwanted)
    return None


def _why_unwanted(task: TaskFact, snapshot: Snapshot) -> str | None:
    if task.vector_table_id not in snapshot.wanted_partitions:
        return "The vector table was deleted."
    return "Cancelled." if task.cancel_requested else None


def decide_runs(snapshot: Snapshot, decisions: Sequence[TaskDecision], limits: Limits) -> list[RunDecision]:
    """Runs that serve nobody: queued for a task that has ended, or in flight without a task and without a process."""
    live = {task.task_id for task in snapshot.tasks}
    owners = {task.run_id for task in snapshot.tasks if task.status is TaskStatus.RUNNING}
    cancelled = {decision.task.task_id for decision in decisions if decision.action is Decision.CANCEL}
    silence_limits = SilenceLimits(
        snapshot.now, limits.stale_after, snapshot.code_server_started_at, snapshot.silence_counts
    )
    ends = []
    for run in snapshot.runs_in_flight:
        if run.status is dg.DagsterRunStatus.QUEUED:
            if run.task_id is not None and (run.task_id not in live or run.task_id in cancelled):
                ends.append(RunDecision(run.run_id, cancelled=True, reason="Its task has ended."))
        elif run.run_id not in owners and (reason := why_gone(run.status, run.signs, silence_limits)):
            ends.append(RunDecision(run.run_id, run.status is dg.DagsterRunStatus.CANCELING, reason))
    return ends


def _by_task(runs: Iterable[RunFact]) -> dict[str, list[RunFact]]:
    grouped: dict[str, list[RunFact]] = {}
    for run in runs:
        if run.task_id is not None:
            grouped.setdefault(run.task_id, []).append(run)
    return grouped
