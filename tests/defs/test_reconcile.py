"""The decisions, case by case; `now` is noon."""

from __future__ import annotations

import timeit
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from dagster import DagsterRunStatus as Status

from embedd_dagster.core.fairness import QueuePlace
from embedd_dagster.core.status import TaskStatus, TaskType
from embedd_dagster.defs.liveness import LifeSigns
from embedd_dagster.defs.reconcile.plan import (
    Decision,
    Limits,
    Plan,
    RunFact,
    Snapshot,
    TaskFact,
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
) -> Snapshot:
    keys = frozenset({"vt_1"})
    facts = Snapshot(
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
    "not launched": (seen(PENDING), (Decision.LAUNCH, "task_1:0")),
    "queued": (seen(PENDING, flying=(run(Status.QUEUED),)), None),
    "starting": (seen(PENDING, flying=(run(Status.STARTING),)), None),
    "its first run failed": (seen(PENDING, ended=(run(FAILED),)), (Decision.LAUNCH, "task_1:r1")),
    "the launched run is unknown": (seen(replace(PENDING, run_id="gone")), (Decision.LAUNCH, "task_1:0")),
    "the run was superseded": (seen(PENDING, ended=(run(DONE),)), (Decision.LAUNCH, "task_1:r1")),
    "launched since the runs in flight were read": (seen(PENDING, ended=(run(FAILED), run(Status.QUEUED, "r2"))), None),
    "the run was cancelled in the queue": (seen(PENDING, ended=(run(CANCELED),)), (Decision.CANCEL, None)),
    "the last of two was cancelled": (seen(PENDING, ended=(run(FAILED), run(CANCELED))), (Decision.CANCEL, None)),
    "three runs died before the claim": (seen(PENDING, ended=(run(FAILED),) * 3), (Decision.GIVE_UP, None)),
    "three died, one had claimed": (
        seen(replace(PENDING, attempts=1), ended=(run(FAILED, ended=100),) * 3),
        (Decision.LAUNCH, "task_1:r1"),
    ),
    "the second attempt comes at once": (
        seen(replace(PENDING, attempts=1), ended=(run(FAILED, ended=0),)),
        (Decision.LAUNCH, "task_1:r1"),
    ),
    "the third waits": (seen(replace(PENDING, attempts=2), ended=(run(FAILED, ended=20),) * 2), None),
    "the third has waited": (
        seen(replace(PENDING, attempts=2), ended=(run(FAILED, "r0", ended=70), run(FAILED, ended=31))),
        (Decision.LAUNCH, "task_1:r1"),
    ),
    "cancel was asked for": (seen(replace(PENDING, cancel_requested=True)), (Decision.CANCEL, None)),
    "cancel was asked for in the queue": (
        seen(replace(PENDING, cancel_requested=True), flying=(run(Status.QUEUED),)),
        (Decision.CANCEL, None),
    ),
    "its table is deleted": (seen(PENDING, **DELETED), (Decision.CANCEL, None)),
    # a running one
    "runs": (seen(RUNNING, flying=(run(Status.STARTED),)), None),
    "is being cancelled": (seen(replace(RUNNING, cancel_requested=True), flying=(run(Status.CANCELING),)), None),
    "its run failed": (seen(RUNNING, ended=(run(FAILED),)), (Decision.REQUEUE, None)),
    "its run succeeded without finishing it": (seen(RUNNING, ended=(run(DONE),)), (Decision.REQUEUE, None)),
    "its run was cancelled": (seen(RUNNING, ended=(run(CANCELED),)), (Decision.CANCEL, None)),
    "its run failed, and cancel was asked for": (
        seen(replace(RUNNING, cancel_requested=True), ended=(run(FAILED),)),
        (Decision.CANCEL, None),
    ),
    "an older run failed, the owner is not known yet": (seen(RUNNING, ended=(run(FAILED, "r0"),)), None),
    "silent": (seen(SILENT, flying=(run(Status.STARTED),)), (Decision.REQUEUE, None)),
    "silent after an outage": (seen(SILENT, flying=(run(Status.STARTED),), silence_counts=False), None),
    "silent, and its run is unknown": (seen(SILENT), (Decision.REQUEUE, None)),
    "silent while it is cancelled": (seen(SILENT, flying=(run(Status.CANCELING),)), (Decision.CANCEL, None)),
    "silent, and cancel was asked for": (
        seen(replace(SILENT, cancel_requested=True), flying=(run(Status.STARTED),)),
        (Decision.CANCEL, None),
    ),
    "its table was deleted": (seen(RUNNING, flying=(run(Status.STARTED),), **DELETED), (Decision.ASK_TO_END, None)),
    "its table was deleted, and it knows": (
        seen(replace(RUNNING, cancel_requested=True), flying=(run(Status.STARTED),), **DELETED),
        None,
    ),
    "its table was deleted, its run died": (seen(RUNNING, ended=(run(FAILED),), **DELETED), (Decision.CANCEL, None)),
}


@pytest.mark.parametrize(("observation", "expected"), CASES.values(), ids=CASES.keys())
def test_a_live_task(observation: Snapshot, expected: tuple[Decision, str | None] | None) -> None:
    decisions = [(decision.action, decision.run_key) for decision in plan(observation, LIMITS).tasks]
    assert decisions == ([expected] if expected else [])


def test_a_silent_run_is_ended_with_its_task() -> None:
    (requeued,) = plan(seen(SILENT, flying=(run(Status.STARTED),)), LIMITS).tasks
    assert requeued.ends is not None
    assert (requeued.ends.run_id, requeued.ends.cancelled) == ("r1", False)
    (cancelled,) = plan(seen(SILENT, flying=(run(Status.CANCELING),)), LIMITS).tasks
    assert cancelled.ends is not None
    assert cancelled.ends.cancelled


GAVE_A_HEARTBEAT = {"changed_at": ago(3600), "started_at": ago(3600)}


@pytest.mark.parametrize(
    ("flying", "tasks", "signs", "expected"),
    [
        (run(Status.QUEUED), (), {}, True),  # its task has ended
        (run(Status.QUEUED, task=None), (), {"changed_at": ago(999)}, None),  # it makes its task when it starts
        (run(Status.QUEUED), (PENDING,), {"changed_at": ago(999)}, None),
        (run(Status.QUEUED), (replace(PENDING, cancel_requested=True),), {}, True),
        # it checks the asset, for an hour already
        (run(Status.STARTED), (), {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(29)}, None),
        (run(Status.STARTED), (), {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(31)}, False),
        # it gave its task back, and was killed before it could end
        (run(Status.STARTED), (PENDING,), {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(31)}, False),
        # it began, and loads its code
        (run(Status.STARTED), (PENDING,), {"changed_at": ago(44), "started_at": ago(44)}, None),
        (run(Status.STARTED), (PENDING,), {"changed_at": ago(46), "started_at": ago(46)}, False),
        # the code server that was starting it was killed; or it is only slow, and Dagster's own limit counts
        (run(Status.STARTING), (PENDING,), {"changed_at": ago(46)}, False),
        (run(Status.STARTING), (PENDING,), {"changed_at": ago(44)}, None),
        (run(Status.CANCELING), (), {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(31)}, True),
        (run(Status.CANCELING), (), {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(1)}, None),
        (
            run(Status.STARTED),
            (RUNNING,),
            {**GAVE_A_HEARTBEAT, "heartbeat_at": ago(31)},
            None,
        ),  # its task says it lives
    ],
)
def test_a_run_that_serves_nobody_is_ended_within_a_minute(
    flying: RunFact, tasks: tuple[TaskFact, ...], signs: dict[str, datetime], expected: bool | None
) -> None:
    flying = replace(flying, signs=LifeSigns(**signs))
    # a code server that has just started judges as one that has been there all the time
    for started_at in (ago(1), ago(30)):
        ends = plan(seen(*tasks, flying=(flying,), code_server_started_at=started_at), LIMITS).runs
        assert [end.cancelled for end in ends] == ([] if expected is None else [expected])


def test_a_slow_start_under_a_living_code_server_is_left_to_dagsters_own_limit() -> None:
    starting = replace(run(Status.STARTING), signs=LifeSigns(changed_at=ago(100)))
    assert plan(seen(PENDING, flying=(starting,), code_server_started_at=ago(200)), LIMITS).runs == ()


def test_silence_of_a_run_without_a_task_is_forgiven_after_an_outage() -> None:
    silent = replace(run(Status.STARTED), signs=LifeSigns(heartbeat_at=ago(31)))
    assert plan(seen(PENDING, flying=(silent,), silence_counts=False), LIMITS).runs == ()


@pytest.mark.parametrize(("age", "ends"), [(14, 0), (16, 1)])
def test_a_run_that_was_made_and_never_queued_is_ended(age: float, ends: int) -> None:
    lost = replace(run(Status.NOT_STARTED), signs=LifeSigns(created_at=ago(age)))
    planned = plan(seen(PENDING, flying=(lost,)), LIMITS)
    assert len(planned.runs) == ends
    assert not any(decision.cancelled for decision in planned.runs), "its task is launched again"
    assert planned.tasks == ()
    queued = replace(run(Status.QUEUED), signs=LifeSigns(created_at=ago(age)))
    assert plan(seen(PENDING, flying=(queued,)), LIMITS).runs == ()


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


def waiting(count: int, environment: str, start: int = 0, **values: object) -> tuple[TaskFact, ...]:
    return tuple(
        replace(PENDING, task_id=f"task_{environment}_{n}", vector_table_id=f"vt_{environment}_{n}", **values)
        for n in range(start, start + count)
    )


def same(ids: Iterable[str]) -> dict[str, str]:
    """Partitions whose keys are the ids."""
    return {key: key for key in ids}


def observation_of(*tasks: TaskFact, rows: int = 0, **others: object) -> Snapshot:
    """All there, each in the environment that its id names."""
    ids = frozenset(task.vector_table_id for task in tasks)
    places = {key: QueuePlace("org", key.split("_")[1], "provider", rows) for key in ids}
    return seen(*tasks, **{"wanted_partitions": same(ids), "partition_keys": ids, "places": places, **others})


def queued(*tasks: TaskFact) -> tuple[RunFact, ...]:
    return tuple(RunFact(f"r_{task.task_id}", Status.QUEUED, task.task_id, task.vector_table_id) for task in tasks)


def test_a_tick_launches_so_much_and_no_more() -> None:
    many = [task for n in range(40) for task in waiting(1, f"e{n}")]
    assert len(plan(observation_of(*many), LIMITS).tasks) == 25
    tables = tuple(f"vt_{n}" for n in range(40))
    places = {key: QueuePlace("org", key) for key in tables}
    observation = seen(wanted_partitions=same(tables), awaiting_rebackfill=tables, places=places)
    assert len(plan(observation, LIMITS).rebackfills) == 25


def test_a_thousand_backfills_of_one_environment_do_not_delay_another() -> None:
    flood = waiting(1000, "a")
    first = plan(observation_of(*flood), LIMITS)
    assert len(first.tasks) == 8, "enough to keep its slots at work"
    ahead = flood[:8]
    (late,) = waiting(1, "b", created_at=ago(5))
    (launched,) = plan(observation_of(*flood, late, flying=queued(*ahead)), LIMITS).tasks
    assert launched.task.task_id == late.task_id


def test_environments_take_turns() -> None:
    flood = [*waiting(20, "a", created_at=ago(90)), *waiting(20, "b"), *waiting(20, "c", created_at=ago(30))]
    launched = [decision.task.vector_table_id for decision in plan(observation_of(*flood), LIMITS).tasks]
    counts = Counter(key.split("_")[1] for key in launched)
    assert max(counts.values()) - min(counts.values()) <= 1, "though those of one are older"
    # the environment with the fewest runs comes next
    ahead = [task for task in flood if "_a_" in task.task_id][:3]
    launched = plan(observation_of(*flood, flying=queued(*ahead)), LIMITS).tasks
    assert {"b", "c"} == {decision.task.vector_table_id.split("_")[1] for decision in launched[:4]}


def test_a_small_sync_does_not_wait_behind_backfills() -> None:
    flood = waiting(1000, "a", created_at=ago(900))
    sync = replace(waiting(1, "a", start=5000)[0], task_type=TaskType.SYNC, created_at=ago(5))
    planned = plan(observation_of(*flood, sync, flying=queued(*flood[:8])), LIMITS)
    assert [decision.task.task_id for decision in planned.tasks] == [sync.task_id]
    # one of a large table may last as long as a build: it takes its turn
    planned = plan(observation_of(*flood, sync, rows=1_000_000, flying=queued(*flood[:8])), LIMITS)
    assert not planned.tasks


def test_small_syncs_do_not_keep_backfills_from_starting() -> None:
    syncs = waiting(1000, "a", task_type=TaskType.SYNC, created_at=ago(900))
    planned = plan(observation_of(*syncs, *waiting(5, "a", start=2000)), LIMITS)
    types = Counter(decision.task.task_type for decision in planned.tasks)
    assert types == {TaskType.SYNC: 10, TaskType.BACKFILL: 5}


def test_what_is_queued_by_the_sensor_itself_takes_its_turn_too() -> None:
    flood = waiting(8, "a")
    ids = [task.vector_table_id for task in flood]
    waiting_too = ("vt_a_900", "vt_b_901")
    observation = observation_of(*flood, flying=queued(*flood))
    places = {**observation.places, **{key: QueuePlace("org", key.split("_")[1]) for key in waiting_too}}
    observation = replace(
        observation,
        wanted_partitions=same({*ids, *waiting_too}),
        awaiting_rebackfill=waiting_too,
        places=places,
    )
    assert plan(observation, LIMITS).rebackfills == ("vt_b_901",)


def test_a_backfill_that_dagster_gave_up_is_not_a_cancelled_task() -> None:
    gone = replace(run(CANCELED), given_up=True, backfill_id="b")
    (pending,) = plan(seen(PENDING, ended=(gone,)), LIMITS).tasks
    assert (pending.action, pending.run_key) == (Decision.LAUNCH, "task_1:r1")
    (running,) = plan(seen(RUNNING, ended=(gone,)), LIMITS).tasks
    assert (running.action, running.is_attempt) == (Decision.REQUEUE, False)
    canceling = replace(gone, status=Status.CANCELING)
    (silent,) = plan(seen(SILENT, flying=(canceling,)), LIMITS).tasks
    assert (silent.action, silent.is_attempt) == (Decision.REQUEUE, False)
    (wanted,) = plan(seen(replace(RUNNING, cancel_requested=True), ended=(gone,)), LIMITS).tasks
    assert wanted.action is Decision.CANCEL, "somebody asked for it, too"


def test_runs_that_gave_their_task_back_do_not_count_as_failed_starts() -> None:
    ended = tuple(run(FAILED, f"r{n}", ended=100) for n in range(5))
    (decision,) = plan(seen(replace(PENDING, handed_back=5), ended=ended), LIMITS).tasks
    assert decision.action is Decision.LAUNCH


def test_partitions_that_a_backfill_still_needs_are_kept() -> None:
    observation = seen(wanted_partitions={}, targeted_keys=frozenset({"vt_1"}))
    assert plan(observation, LIMITS).partitions_to_delete == ()
    assert plan(replace(observation, targeted_keys=frozenset()), LIMITS).partitions_to_delete == ("vt_1",)


def test_the_work_to_plan_grows_with_the_number_of_tables_and_no_faster() -> None:
    def seconds(count: int) -> float:
        keys = [f"vt_{n}" for n in range(count)]
        tasks = tuple(replace(PENDING, task_id=f"task_{n}", vector_table_id=keys[n]) for n in range(count))
        wanted = dict(zip(keys, keys, strict=True))
        observation = seen(*tasks, wanted_partitions=wanted, partition_keys=frozenset(keys[: count // 2]))
        return min(timeit.repeat(lambda: plan(observation, LIMITS), number=1, repeat=3))

    # ten times the tables: about ten times the work, where a search for each among all would be a hundred times
    assert seconds(10_000) < 40 * seconds(1_000)


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


def test_a_partition_named_by_an_id_stays_while_a_backfill_in_dagster_still_needs_it() -> None:
    before = seen(
        wanted_partitions={"vt_1": "vt_1_products"},
        partition_keys=frozenset({"vt_1"}),
        targeted_keys=frozenset({"vt_1"}),
    )
    planned = plan(before, LIMITS)
    assert (planned.partitions_to_add, planned.partitions_to_delete) == (("vt_1_products",), ())
    assert planned.partitions_to_move == {}
    planned = plan(replace(before, targeted_keys=frozenset()), LIMITS)
    assert (planned.partitions_to_delete, planned.partitions_to_move) == (("vt_1",), {"vt_1": "vt_1_products"})


def test_only_what_is_deleted_at_this_tick_is_moved_at_this_tick() -> None:
    wanted = {f"vt_z{n}": f"vt_z{n}_name" for n in range(20)}
    gone = {f"vt_gone{n}" for n in range(LIMITS.deletions_per_tick - 5)}
    planned = plan(seen(wanted_partitions=wanted, partition_keys=frozenset({*wanted, *gone})), LIMITS)
    assert len(planned.partitions_to_delete) == LIMITS.deletions_per_tick
    assert set(planned.partitions_to_move) == set(planned.partitions_to_delete) - gone


def test_a_tick_moves_so_many_partitions_and_deletes_no_other() -> None:
    wanted = {f"vt_{n}": f"vt_{n}_name" for n in range(60)}
    planned = plan(seen(wanted_partitions=wanted, partition_keys=frozenset(wanted)), LIMITS)
    assert len(planned.partitions_to_move) == LIMITS.requests_per_tick
    assert set(planned.partitions_to_delete) == set(planned.partitions_to_move)
