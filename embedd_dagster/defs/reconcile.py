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

import dagster as dg

from embedd_dagster.catalog.resyncs import OwedSync
from embedd_dagster.core.status import TaskStatus, TaskType

IN_FLIGHT = frozenset(
    {
        dg.DagsterRunStatus.QUEUED,
        dg.DagsterRunStatus.NOT_STARTED,
        dg.DagsterRunStatus.STARTING,
        dg.DagsterRunStatus.STARTED,
        dg.DagsterRunStatus.CANCELING,
    }
)


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
    run_id: str | None = None
    """While running, the owner; while pending, the run that the API has launched, if it did."""
    heartbeat_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunFact:
    """A run of the asset, as Dagster has it.

    CANCELED means that somebody asked for it: Dagster ends a run whose process was told to stop as FAILURE.
    """

    run_id: str
    status: dg.DagsterRunStatus
    task_id: str | None = None
    partition_key: str | None = None
    ended_at: datetime | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """Both sides at one instant. Runs are read before tasks: a queued run whose task is not there has lost it."""

    now: datetime
    wanted_partitions: Mapping[str, str]
    """The partition keys of the vector tables that are not being deleted, by id."""
    awaiting_rebackfill: tuple[str, ...] = ()
    owed_syncs: tuple[OwedSync, ...] = ()
    tasks: tuple[TaskFact, ...] = ()
    partition_keys: frozenset[str] = frozenset()
    runs_in_flight: tuple[RunFact, ...] = ()
    runs_ended: Mapping[str, Sequence[RunFact]] = field(default_factory=dict)
    """By task, oldest first; known only for tasks that have no run in flight."""
    idle_seconds: Mapping[str, float] = field(default_factory=dict)
    """For how long a run in flight has been seen to own nothing, see `idle_runs`."""
    silence_counts: bool = True
    """False just after an outage of the catalog or of this sensor, when no run can have given a heartbeat."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient, and how much at once."""

    stale_after: timedelta
    launch_grace: timedelta = timedelta(seconds=3)
    """The API launches a task's run itself, a moment after it has committed the task."""
    submission: timedelta = timedelta(seconds=15)
    """A run is made a moment before it is queued. One that stays so lost whoever was queueing it, such as a webserver whose
    connection to Dagster's database broke in between."""
    idle_run: timedelta = timedelta(seconds=300)
    """A run owns nothing while it starts, and while it checks the asset; after so long, its process is gone."""
    retry_delay: timedelta = timedelta(seconds=30)
    """Before the third attempt, and as much more before each further one; the second comes at once."""
    requests_per_tick: int = 25
    """The daemon launches some ten runs a second, and only then ticks again."""


class Verdict(StrEnum):
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
    verdict: Verdict
    reason: str
    run_key: str | None = None
    ends: RunDecision | None = None


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
    syncs: tuple[OwedSync, ...] = ()
    tasks: tuple[TaskDecision, ...] = ()
    runs: tuple[RunDecision, ...] = ()


def plan(seen: Observation, limits: Limits) -> Plan:
    """What brings Dagster and the catalog together; empty where they agree."""
    in_flight = _by_task(seen.runs_in_flight)
    decisions = []
    requests_left = limits.requests_per_tick
    for task in seen.tasks:
        decision = judge_task(task, in_flight.get(task.task_id, ()), seen, limits)
        if decision is None:
            continue
        if decision.verdict is Verdict.LAUNCH:
            if requests_left == 0:
                continue
            requests_left -= 1
        decisions.append(decision)
    busy = {task.vector_table_id for task in seen.tasks}
    waiting = [table for table in seen.awaiting_rebackfill if table not in busy and table in seen.wanted_partitions]
    to_add, to_delete = partition_changes(
        seen.wanted_partitions.values(), seen.partition_keys, {run.partition_key for run in seen.runs_in_flight}
    )
    former = [key for key in to_delete if key in seen.wanted_partitions]
    later = set(former[limits.requests_per_tick :])
    return Plan(
        partitions_to_add=to_add,
        partitions_to_delete=tuple(key for key in to_delete if key not in later),
        partitions_to_move={key: seen.wanted_partitions[key] for key in former if key not in later},
        rebackfills=tuple(waiting[:requests_left]),
        syncs=seen.owed_syncs[: max(0, requests_left - len(waiting))],
        tasks=tuple(decisions),
        runs=tuple(judge_runs(seen, decisions, limits)),
    )


def partition_changes(
    wanted: Iterable[str], existing: Iterable[str], in_flight: Iterable[str | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys to add, keys to delete), sorted; a key with a run in flight is deleted once that has ended.

    A run whose partition is deleted under it fails when it stores what it made.
    """
    wanted, existing = set(wanted), set(existing)
    return tuple(sorted(wanted - existing)), tuple(sorted(existing - wanted - set(in_flight)))


def judge_task(task: TaskFact, in_flight: Sequence[RunFact], seen: Observation, limits: Limits) -> TaskDecision | None:
    """What becomes of one live task, given its runs in flight; None where all is well, or it is too early to say."""
    if task.status is TaskStatus.PENDING:
        return _judge_pending(task, in_flight, seen, limits)
    return _judge_running(task, in_flight, seen, limits)


def _judge_pending(
    task: TaskFact, in_flight: Sequence[RunFact], seen: Observation, limits: Limits
) -> TaskDecision | None:
    unwanted = _why_unwanted(task, seen)
    if unwanted:
        return TaskDecision(task, Verdict.CANCEL, unwanted)
    if in_flight:
        return None
    ended = seen.runs_ended.get(task.task_id, ())
    if not ended:
        early = seen.now - task.created_at < limits.launch_grace
        return None if early else _launch(task, ended, "No run was launched for the task yet.")
    return _judge_after_runs(task, ended, seen, limits)


def _judge_after_runs(
    task: TaskFact, ended: Sequence[RunFact], seen: Observation, limits: Limits
) -> TaskDecision | None:
    latest = ended[-1]
    if latest.status in IN_FLIGHT:
        return None  # launched since the runs in flight were read
    if latest.status is dg.DagsterRunStatus.CANCELED:
        return TaskDecision(task, Verdict.CANCEL, f"Run {latest.run_id} was cancelled in Dagster before it began.")
    failures = sum(run.status is dg.DagsterRunStatus.FAILURE for run in ended)
    if failures - task.attempts >= task.max_attempts:
        return TaskDecision(
            task,
            Verdict.GIVE_UP,
            f"{failures - task.attempts} runs ended before they could begin the task; "
            f"see run {latest.run_id} in the Dagster UI.",
        )
    delay = limits.retry_delay * max(0, max(task.attempts, failures) - 1)
    if latest.ended_at is not None and seen.now - latest.ended_at < delay:
        return None
    return _launch(task, ended, f"Run {latest.run_id} has ended ({latest.status.value}) and the task is still to do.")


def _launch(task: TaskFact, ended: Sequence[RunFact], reason: str) -> TaskDecision:
    # Dagster launches nothing for a key that one of its runs has. The latest run makes it: the same on a tick that is
    # repeated, another for the next attempt, and never one that is taken, whichever runs somebody has deleted: a run
    # that has it is itself later than the run it names
    return TaskDecision(task, Verdict.LAUNCH, reason, run_key=f"{task.task_id}:{ended[-1].run_id if ended else 0}")


def _judge_running(
    task: TaskFact, in_flight: Sequence[RunFact], seen: Observation, limits: Limits
) -> TaskDecision | None:
    unwanted = _why_unwanted(task, seen)
    owner = next((run for run in in_flight if run.run_id == task.run_id), None)
    if owner is None:
        ended = seen.runs_ended.get(task.task_id, ())
        owner = next((run for run in ended if run.run_id == task.run_id), None)
    last_seen = task.heartbeat_at or task.created_at
    silent = seen.silence_counts and seen.now - last_seen > limits.stale_after
    if owner is not None and owner.status not in IN_FLIGHT:
        cancelled = owner.status is dg.DagsterRunStatus.CANCELED
        reason = f"Run {owner.run_id} ended ({owner.status.value}) without finishing the task."
        if cancelled or unwanted:
            return TaskDecision(task, Verdict.CANCEL, unwanted or f"Run {owner.run_id} was cancelled in Dagster.")
        return TaskDecision(task, Verdict.REQUEUE, reason)
    if silent:
        reason = (
            f"Run {task.run_id} has given no heartbeat since {last_seen:%Y-%m-%d %H:%M:%S} UTC; its process is gone."
        )
        if unwanted or (owner is not None and owner.status is dg.DagsterRunStatus.CANCELING):
            verdict = Verdict.CANCEL
        else:
            verdict = Verdict.REQUEUE
        ends = None if owner is None else RunDecision(owner.run_id, verdict is Verdict.CANCEL, reason)
        return TaskDecision(task, verdict, unwanted or reason, ends=ends)
    if unwanted and not task.cancel_requested:
        return TaskDecision(task, Verdict.ASK_TO_END, unwanted)
    return None


def _why_unwanted(task: TaskFact, seen: Observation) -> str | None:
    if task.vector_table_id not in seen.wanted_partitions:
        return "The vector table was deleted."
    return "Cancelled." if task.cancel_requested else None


def judge_runs(seen: Observation, decisions: Sequence[TaskDecision], limits: Limits) -> list[RunDecision]:
    """Runs that serve nobody: queued for a task that has ended, or in flight long after they owned one."""
    live = {task.task_id for task in seen.tasks}
    cancelled = {decision.task.task_id for decision in decisions if decision.verdict is Verdict.CANCEL}
    ending = {decision.ends.run_id for decision in decisions if decision.ends is not None}
    ends = []
    for run in seen.runs_in_flight:
        if run.run_id in ending:
            continue
        if run.status is dg.DagsterRunStatus.QUEUED:
            if run.task_id is not None and (run.task_id not in live or run.task_id in cancelled):
                ends.append(RunDecision(run.run_id, cancelled=True, reason="Its task has ended."))
        elif _was_never_queued(run, seen, limits):
            ends.append(RunDecision(run.run_id, cancelled=False, reason="It was made, and never put into the queue."))
        elif seen.idle_seconds.get(run.run_id, 0.0) > limits.idle_run.total_seconds():
            canceling = run.status is dg.DagsterRunStatus.CANCELING
            ends.append(
                RunDecision(run.run_id, canceling, "It works on no task, and does not end: its process is gone.")
            )
    return ends


def _was_never_queued(run: RunFact, seen: Observation, limits: Limits) -> bool:
    if run.status is not dg.DagsterRunStatus.NOT_STARTED or run.created_at is None:
        return False
    return seen.now - run.created_at > limits.submission


def idle_runs(seen: Observation) -> frozenset[str]:
    """Runs in flight that own no task at this instant, but for those that wait in the queue."""
    owners = {task.run_id for task in seen.tasks if task.status is TaskStatus.RUNNING}
    return frozenset(
        run.run_id
        for run in seen.runs_in_flight
        if run.status is not dg.DagsterRunStatus.QUEUED and run.run_id not in owners
    )


def _by_task(runs: Iterable[RunFact]) -> dict[str, list[RunFact]]:
    grouped: dict[str, list[RunFact]] = {}
    for run in runs:
        if run.task_id is not None:
            grouped.setdefault(run.task_id, []).append(run)
    return grouped
