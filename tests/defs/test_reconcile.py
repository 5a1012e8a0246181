"""The decisions, case by case; `now` is noon."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from dagster import DagsterRunStatus as Status

from embedd_dagster.core.status import TaskStatus, TaskType
from embedd_dagster.defs.reconcile import (
    Limits,
    Observation,
    Plan,
    RunFact,
    TaskFact,
    Verdict,
    idle_runs,
    partition_changes,
    plan,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LIMITS = Limits(stale_after=timedelta(seconds=30))


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


PENDING = TaskFact("task_1", "vt_1", TaskType.BACKFILL, TaskStatus.PENDING, 0, 3, False, ago(60))
RUNNING = replace(PENDING, status=TaskStatus.RUNNING, attempts=1, run_id="r1", heartbeat_at=ago(1))
SILENT = replace(RUNNING, heartbeat_at=ago(31))


def run(status: Status, run_id: str = "r1", *, task: str | None = "task_1", ended: float | None = None) -> RunFact:
    return RunFact(run_id, status, task, "vt_1", None if ended is None else ago(ended))


def seen(
    *tasks: TaskFact, flying: tuple[RunFact, ...] = (), ended: tuple[RunFact, ...] = (), **others: object
) -> Observation:
    keys = frozenset({"vt_1"})
    facts = Observation(
        now=NOW,
        wanted_partitions={"vt_1": "vt_1"},
        partition_keys=keys,
        tasks=tasks,
        runs_in_flight=flying,
        runs_ended={"task_1": ended} if ended else {},
    )
    return replace(facts, **others)


FAILED, DONE, CANCELED = Status.FAILURE, Status.SUCCESS, Status.CANCELED
DELETED: dict[str, object] = {"wanted_partitions": {}}

CASES = {
    # a pending task
    "just created: the API launches it": (seen(replace(PENDING, created_at=ago(1))), None),
    "not launched": (seen(PENDING), (Verdict.LAUNCH, "task_1:0")),
    "queued": (seen(PENDING, flying=(run(Status.QUEUED),)), None),
    "starting": (seen(PENDING, flying=(run(Status.STARTING),)), None),
    "its first run failed": (seen(PENDING, ended=(run(FAILED),)), (Verdict.LAUNCH, "task_1:r1")),
    "the launched run is unknown": (seen(replace(PENDING, run_id="gone")), (Verdict.LAUNCH, "task_1:0")),
    "the run was superseded": (seen(PENDING, ended=(run(DONE),)), (Verdict.LAUNCH, "task_1:r1")),
    "launched since the runs in flight were read": (seen(PENDING, ended=(run(FAILED), run(Status.QUEUED, "r2"))), None),
    "the run was cancelled in the queue": (seen(PENDING, ended=(run(CANCELED),)), (Verdict.CANCEL, None)),
    "the last of two was cancelled": (seen(PENDING, ended=(run(FAILED), run(CANCELED))), (Verdict.CANCEL, None)),
    "three runs died before the claim": (seen(PENDING, ended=(run(FAILED),) * 3), (Verdict.GIVE_UP, None)),
    "three died, one had claimed": (
        seen(replace(PENDING, attempts=1), ended=(run(FAILED, ended=100),) * 3),
        (Verdict.LAUNCH, "task_1:r1"),
    ),
    "the second attempt comes at once": (
        seen(replace(PENDING, attempts=1), ended=(run(FAILED, ended=0),)),
        (Verdict.LAUNCH, "task_1:r1"),
    ),
    "the third waits": (seen(replace(PENDING, attempts=2), ended=(run(FAILED, ended=20),) * 2), None),
    "the third has waited": (
        seen(replace(PENDING, attempts=2), ended=(run(FAILED, "r0", ended=70), run(FAILED, ended=31))),
        (Verdict.LAUNCH, "task_1:r1"),
    ),
    "cancel was asked for": (seen(replace(PENDING, cancel_requested=True)), (Verdict.CANCEL, None)),
    "cancel was asked for in the queue": (
        seen(replace(PENDING, cancel_requested=True), flying=(run(Status.QUEUED),)),
        (Verdict.CANCEL, None),
    ),
    "its table is deleted": (seen(PENDING, **DELETED), (Verdict.CANCEL, None)),
    # a running one
    "runs": (seen(RUNNING, flying=(run(Status.STARTED),)), None),
    "is being cancelled": (seen(replace(RUNNING, cancel_requested=True), flying=(run(Status.CANCELING),)), None),
    "its run failed": (seen(RUNNING, ended=(run(FAILED),)), (Verdict.REQUEUE, None)),
    "its run succeeded without finishing it": (seen(RUNNING, ended=(run(DONE),)), (Verdict.REQUEUE, None)),
    "its run was cancelled": (seen(RUNNING, ended=(run(CANCELED),)), (Verdict.CANCEL, None)),
    "its run failed, and cancel was asked for": (
        seen(replace(RUNNING, cancel_requested=True), ended=(run(FAILED),)),
        (Verdict.CANCEL, None),
    ),
    "an older run failed, the owner is not known yet": (seen(RUNNING, ended=(run(FAILED, "r0"),)), None),
    "silent": (seen(SILENT, flying=(run(Status.STARTED),)), (Verdict.REQUEUE, None)),
    "silent after an outage": (seen(SILENT, flying=(run(Status.STARTED),), silence_counts=False), None),
    "silent, and its run is unknown": (seen(SILENT), (Verdict.REQUEUE, None)),
    "silent while it is cancelled": (seen(SILENT, flying=(run(Status.CANCELING),)), (Verdict.CANCEL, None)),
    "silent, and cancel was asked for": (
        seen(replace(SILENT, cancel_requested=True), flying=(run(Status.STARTED),)),
        (Verdict.CANCEL, None),
    ),
    "its table was deleted": (seen(RUNNING, flying=(run(Status.STARTED),), **DELETED), (Verdict.ASK_TO_END, None)),
    "its table was deleted, and it knows": (
        seen(replace(RUNNING, cancel_requested=True), flying=(run(Status.STARTED),), **DELETED),
        None,
    ),
    "its table was deleted, its run died": (seen(RUNNING, ended=(run(FAILED),), **DELETED), (Verdict.CANCEL, None)),
}


@pytest.mark.parametrize(("observation", "expected"), CASES.values(), ids=CASES.keys())
def test_a_live_task(observation: Observation, expected: tuple[Verdict, str | None] | None) -> None:
    decisions = [(decision.verdict, decision.run_key) for decision in plan(observation, LIMITS).tasks]
    assert decisions == ([expected] if expected else [])


def test_a_silent_run_is_ended_with_its_task() -> None:
    (requeued,) = plan(seen(SILENT, flying=(run(Status.STARTED),)), LIMITS).tasks
    assert requeued.ends is not None
    assert (requeued.ends.run_id, requeued.ends.cancelled) == ("r1", False)
    (cancelled,) = plan(seen(SILENT, flying=(run(Status.CANCELING),)), LIMITS).tasks
    assert cancelled.ends is not None
    assert cancelled.ends.cancelled


@pytest.mark.parametrize(
    ("flying", "tasks", "idle", "expected"),
    [
        (run(Status.QUEUED), (), 0, True),  # its task has ended
        (run(Status.QUEUED, task=None), (), 999, None),  # asked for in the UI: it makes its task when it starts
        (run(Status.QUEUED), (PENDING,), 999, None),
        (run(Status.QUEUED), (replace(PENDING, cancel_requested=True),), 0, True),
        (run(Status.STARTED), (), 299, None),  # checks the asset
        (run(Status.STARTED), (), 301, False),
        (run(Status.NOT_STARTED), (PENDING,), 301, False),
        (run(Status.CANCELING), (), 301, True),
    ],
)
def test_a_run_that_serves_nobody(
    flying: RunFact, tasks: tuple[TaskFact, ...], idle: float, expected: bool | None
) -> None:
    ends = plan(seen(*tasks, flying=(flying,), idle_seconds={"r1": idle}), LIMITS).runs
    assert [end.cancelled for end in ends] == ([] if expected is None else [expected])


@pytest.mark.parametrize(("age", "ends"), [(14, 0), (16, 1)])
def test_a_run_that_was_made_and_never_queued_is_ended(age: float, ends: int) -> None:
    lost = replace(run(Status.NOT_STARTED), created_at=ago(age))
    planned = plan(seen(PENDING, flying=(lost,)), LIMITS)
    assert len(planned.runs) == ends
    assert not any(decision.cancelled for decision in planned.runs), "its task is launched again"
    assert planned.tasks == ()
    queued = replace(run(Status.QUEUED), created_at=ago(age))
    assert plan(seen(PENDING, flying=(queued,)), LIMITS).runs == ()


def test_runs_that_own_nothing() -> None:
    runs = (run(Status.STARTED), run(Status.STARTED, "r2"), run(Status.QUEUED, "r3"), run(Status.STARTING, "r4"))
    assert idle_runs(seen(RUNNING, flying=runs)) == {"r2", "r4"}
    assert idle_runs(seen(replace(PENDING, run_id="r1"), flying=runs)) == {"r1", "r2", "r4"}


@pytest.mark.parametrize(
    ("wanted", "existing", "in_flight", "expected"),
    [
        ({"a", "b"}, {"b"}, (), (("a",), ())),
        ({"a"}, {"a", "b", "c"}, {"b", None}, ((), ("c",))),
        (set(), {"a"}, (), ((), ("a",))),
        ({"a"}, {"a"}, (), ((), ())),
    ],
)
def test_partitions(wanted: set[str], existing: set[str], in_flight: set[str | None], expected: object) -> None:
    assert partition_changes(wanted, existing, in_flight) == expected


def test_rebackfills_begin_where_nothing_runs() -> None:
    everyone = {key: key for key in ("vt_1", "vt_2", "vt_3")}
    flying = (run(Status.STARTED),)
    observation = seen(RUNNING, flying=flying, wanted_partitions=everyone, partition_keys=frozenset(everyone))
    assert plan(replace(observation, awaiting_rebackfill=("vt_1", "vt_2", "vt_gone")), LIMITS) == Plan(
        rebackfills=("vt_2",)
    )


def test_a_tick_launches_so_much_and_no_more() -> None:
    many = tuple(replace(PENDING, task_id=f"task_{n}", vector_table_id=f"vt_{n}") for n in range(40))
    everyone = {f"vt_{n}": f"vt_{n}" for n in range(80)}
    waiting = tuple(f"vt_{n}" for n in range(40, 80))
    planned = plan(seen(*many, wanted_partitions=everyone, awaiting_rebackfill=waiting), LIMITS)
    assert (len(planned.tasks), len(planned.rebackfills)) == (25, 0)
    planned = plan(seen(*many[:20], wanted_partitions=everyone, awaiting_rebackfill=waiting), LIMITS)
    assert (len(planned.tasks), len(planned.rebackfills)) == (20, 5)


def test_ten_thousand_tables_are_planned_in_no_time() -> None:
    keys = [f"vt_{n}" for n in range(10_000)]
    many = tuple(replace(PENDING, task_id=f"task_{n}", vector_table_id=keys[n]) for n in range(10_000))
    import time

    begun = time.perf_counter()
    plan(
        seen(*many, wanted_partitions=dict(zip(keys, keys, strict=True)), partition_keys=frozenset(keys[:5000])), LIMITS
    )
    assert time.perf_counter() - begun < 0.5


def test_a_partition_named_by_an_id_is_moved_to_the_readable_key_and_then_deleted() -> None:
    wanted = {"vt_1": "vt_1_products", "vt_2": "vt_2_articles"}
    before = seen(wanted_partitions=wanted, partition_keys=frozenset({"vt_1", "vt_2_articles", "vt_gone"}))
    planned = plan(before, LIMITS)
    assert planned.partitions_to_move == {"vt_1": "vt_1_products"}
    assert planned.partitions_to_add == ("vt_1_products",)
    assert planned.partitions_to_delete == ("vt_1", "vt_gone")


def test_a_partition_named_by_an_id_stays_while_a_run_of_it_is_in_flight() -> None:
    wanted = {"vt_1": "vt_1_products"}
    planned = plan(
        seen(RUNNING, flying=(run(Status.STARTED),), wanted_partitions=wanted, partition_keys=frozenset({"vt_1"})),
        LIMITS,
    )
    assert (planned.partitions_to_add, planned.partitions_to_delete) == (("vt_1_products",), ())
    assert planned.partitions_to_move == {}


def test_a_tick_moves_so_many_partitions_and_deletes_no_other() -> None:
    wanted = {f"vt_{n}": f"vt_{n}_name" for n in range(60)}
    planned = plan(seen(wanted_partitions=wanted, partition_keys=frozenset(wanted)), LIMITS)
    assert len(planned.partitions_to_move) == LIMITS.requests_per_tick
    assert set(planned.partitions_to_delete) == set(planned.partitions_to_move)
