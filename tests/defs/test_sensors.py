"""Every rule of the sensors and of the schedule, over a real catalog and real run records."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status

from embedd_dagster.catalog import due_tables, resyncs, tasks, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.tables import RunHeartbeat, VectorSetRow
from embedd_dagster.core.status import TaskType, VectorSetState
from embedd_dagster.definitions import defs
from embedd_dagster.defs import cleanup, resources
from embedd_dagster.defs.cleanup import Delays, clean_up, cleanup_sensor
from embedd_dagster.defs.reconcile import sensor
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.reconcile.sensor import reconcile, reconcile_sensor
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.schedules import next_sync_at, schedule_syncs, sync_sensor
from embedd_dagster.engine import teardown
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, VectorStoreUnavailable
from embedd_dagster.settings import get_settings


def long_ago() -> datetime:
    return now() - timedelta(minutes=5)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def tick(
    instance: dg.DagsterInstance, runtime: Runtime, log: list[str]
) -> Callable[..., dg.SensorResult | dg.SkipReason]:
    memory = Memory()

    def run(*, apply: bool = True, memory: Memory = memory) -> dg.SensorResult | dg.SkipReason:
        result = reconcile(instance, lambda: runtime, memory, log.append)
        if apply and isinstance(result, dg.SensorResult):  # what the daemon does
            for change in result.dynamic_partitions_requests or ():
                if isinstance(change, dg.AddDynamicPartitionsRequest):
                    instance.add_dynamic_partitions("vector_tables", change.partition_keys)
                else:
                    for key in change.partition_keys:
                        instance.delete_dynamic_partition("vector_tables", key)
        return result

    return run


def requests(result: dg.SensorResult | dg.SkipReason) -> list[dg.RunRequest]:
    return list(result.run_requests or ()) if isinstance(result, dg.SensorResult) else []


def test_partitions_follow_the_catalog(tick: Any, tables: Any, instance: dg.DagsterInstance, make_run: Any) -> None:
    first, second = tables.create("a"), tables.create("b")
    tick()
    assert set(instance.get_dynamic_partitions("vector_tables")) == {tables.partition(first), tables.partition(second)}
    assert isinstance(tick(), dg.SkipReason)
    run_id = make_run(Status.STARTED, first)
    tables.delete(first)
    tables.delete(second)
    tick()
    assert set(instance.get_dynamic_partitions("vector_tables")) == {tables.partition(first)}, "a run is in flight"
    instance.report_run_failed(instance.get_run_by_id(run_id))
    tick()
    assert not instance.get_dynamic_partitions("vector_tables")


def test_a_catalog_that_cannot_be_read_is_not_an_empty_one(
    tick: Any, tables: Any, instance: dg.DagsterInstance, log: list[str]
) -> None:
    key = tables.create("a")
    tick()
    down = Catalog("postgresql://nobody@127.0.0.1:1/none")
    broken = Runtime(tables.runtime.settings, down, tables.runtime.box)
    result = reconcile(instance, lambda: broken, Memory(), log.append)
    assert isinstance(result, dg.SkipReason)
    assert "catalog" in (result.skip_message or "")
    assert set(instance.get_dynamic_partitions("vector_tables")) == {tables.partition(key)}


def test_a_task_without_a_run_gets_one(tick: Any, tables: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    (request,) = requests(tick())
    assert (request.partition_key, request.run_key) == (tables.partition(key), f"{task_id}:0")
    assert request.tags["embedd/task_id"] == task_id
    assert (request.tags["embedd/name"], request.tags["embedd/task_type"]) == ("a", "backfill")
    assert request.run_config == {"ops": {"vector_table": {"config": {"mode": "backfill"}}}}
    assert requests(tick())[0].run_key == request.run_key, "the same until Dagster has the run"


def test_the_api_is_left_a_moment_to_launch(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key, created_at=now())
    assert not requests(tick())
    make_run(Status.QUEUED, key, task_id)
    tables.change_task(task_id, created_at=long_ago())
    assert not requests(tick())


def test_a_task_whose_launched_run_died_gets_another(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    run_id = make_run(Status.FAILURE, key, task_id)
    tables.change_task(task_id, dagster_run_id=run_id, launched_at=long_ago())
    (request,) = requests(tick())
    assert request.run_key == f"{task_id}:{run_id}"


@pytest.mark.parametrize("deleted", [[0], [1], [0, 1], [2], [1, 2], [0, 1, 2]])
def test_a_task_gets_another_run_whichever_of_its_runs_are_deleted(
    tick: Any, tables: Any, make_run: Any, instance: dg.DagsterInstance, deleted: list[int]
) -> None:
    """Dagster launches no second run for a key that a run has."""
    key = tables.create("a")
    task_id = tables.task(key)
    tables.change_task(task_id, max_attempts=10)
    runs = [make_run(Status.FAILURE, key, task_id)]  # by the API: without a key
    keys = [""]
    for _ in range(2):
        (request,) = requests(tick())
        assert request.run_key not in keys
        keys.append(request.run_key)
        runs.append(make_run(Status.FAILURE, key, task_id))
    for number in deleted:
        instance.delete_run(runs[number])
    (request,) = requests(tick())
    assert request.run_key not in [run_key for number, run_key in enumerate(keys) if number not in deleted]


def test_a_task_whose_runs_never_begin_is_given_up(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    for _ in range(3):
        make_run(Status.FAILURE, key, task_id)
    assert not requests(tick())
    assert tables.get_task(task_id).status == "failed"
    assert tables[key].sync_status == "error"
    assert "before they could begin" in tables[key].last_error


def test_a_queued_run_that_was_cancelled_in_the_ui_is_a_cancelled_task(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a", live=True)
    task_id = tables.task(key)
    make_run(Status.CANCELED, key, task_id)
    tick()
    assert (tables.get_task(task_id).status, tables[key].sync_status) == ("cancelled", "synced")


@pytest.mark.parametrize(
    ("ended", "status", "sync_status"),
    [
        (Status.FAILURE, "pending", "backfilling"),
        (Status.SUCCESS, "pending", "backfilling"),
        (Status.CANCELED, "cancelled", "pending"),
    ],
)
def test_a_running_task_whose_run_has_ended(
    tick: Any, tables: Any, make_run: Any, ended: Status, status: str, sync_status: str
) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    run_id = make_run(ended, key, task_id)
    tables.claim(task_id, run_id)
    tick()
    assert (tables.get_task(task_id).status, tables[key].sync_status) == (status, sync_status)
    if status == "pending":
        (request,) = requests(tick())
        assert request.run_key == f"{task_id}:{run_id}"
        assert tables[key].last_error


@pytest.mark.parametrize("kind", ["ended", "silent"])
def test_a_task_whose_run_died_gets_another_in_the_same_tick(
    tick: Any, tables: Any, make_run: Any, instance: dg.DagsterInstance, kind: str
) -> None:
    key, other = tables.create("a"), tables.create("b")
    task_id = tables.task(key)
    tables.task(other)
    run_id = make_run(Status.STARTED if kind == "silent" else Status.FAILURE, key, task_id)
    tables.claim(task_id, run_id)
    if kind == "silent":
        tables.change_task(task_id, heartbeat_at=long_ago())
    made = requests(tick())
    assert sorted(request.partition_key for request in made) == sorted(map(tables.partition, [key, other])), "each once"
    (request,) = [request for request in made if request.partition_key == tables.partition(key)]
    assert request.run_key == f"{task_id}:{run_id}"
    again = {request.run_key for request in requests(tick())}
    assert request.run_key in again, "the same until Dagster has the run"


def test_the_third_attempt_waits_a_while(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    tables.change_task(task_id, attempts=1)
    make_run(Status.FAILURE, key, task_id)
    failed = make_run(Status.STARTED, key, task_id)
    tables.claim(task_id, failed)
    tables.change_task(task_id, heartbeat_at=long_ago())
    assert not requests(tick())
    assert tables.get_task(task_id).status == "pending"


def test_attempts_come_to_an_end(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    tables.change_task(task_id, attempts=2)
    tables.claim(task_id, make_run(Status.FAILURE, key, task_id))
    tick()
    assert (tables.get_task(task_id).status, tables[key].sync_status) == ("failed", "error")


def test_a_silent_run_is_failed_and_its_task_queued_again(
    tick: Any, tables: Any, make_run: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    run_id = make_run(Status.STARTED, key, task_id)
    tables.claim(task_id, run_id)
    tick()
    assert instance.get_run_by_id(run_id).status is Status.STARTED
    tables.change_task(task_id, heartbeat_at=long_ago())
    tick()
    assert instance.get_run_by_id(run_id).status is Status.FAILURE
    assert tables.get_task(task_id).status == "pending"
    assert "no heartbeat" in tables.get_task(task_id).last_error
    assert len(requests(tick())) == 1


def test_silence_during_an_outage_is_forgiven(tick: Any, tables: Any, make_run: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    tables.claim(task_id, make_run(Status.STARTED, key, task_id), heartbeat_at=long_ago())
    memory = Memory()
    memory.note_failure(time.monotonic() - 1)
    tick(memory=memory)
    assert tables.get_task(task_id).status == "running"
    memory.watching_since -= 60
    tick(memory=memory)
    assert tables.get_task(task_id).status == "pending"


def test_a_gap_in_ticking_is_an_outage_too() -> None:
    memory = Memory()
    memory.note_read(100, 15)
    assert memory.has_watched_for(100, 30)
    memory.note_read(110, 15)
    assert memory.has_watched_for(110, 30)
    memory.note_read(200, 15)
    assert not memory.has_watched_for(210, 30)
    assert memory.has_watched_for(231, 30)


def test_a_cancelled_task_takes_its_queued_run_along(
    tick: Any, tables: Any, make_run: Any, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    run_id = make_run(Status.QUEUED, key, task_id)
    tables.change_task(task_id, cancel_requested=True, dagster_run_id=run_id)
    tick()
    assert tables.get_task(task_id).status == "cancelled"
    assert instance.get_run_by_id(run_id).status is Status.CANCELED


def test_runs_of_other_code_locations_are_left_alone(tick: Any, tables: Any, instance: dg.DagsterInstance) -> None:
    @dg.op
    def other_op() -> None: ...

    @dg.job
    def other_job() -> None:
        other_op()

    run = instance.create_run_for_job(other_job, status=Status.STARTED)
    with tables.runtime.catalog.transaction() as session:
        session.add(RunHeartbeat(run_id=run.run_id, heartbeat_at=long_ago()))
    tick()
    assert instance.get_run_by_id(run.run_id).status is Status.STARTED


def test_a_newer_configuration_is_built(tick: Any, tables: Any) -> None:
    key = tables.create("a", live=True)
    tables.reconfigure(key)
    assert tables[key].sync_status == "pending_rebackfill"
    (request,) = requests(tick())
    task = tables.live_task(key)
    assert (task.task_type, request.run_key) == ("rebackfill", f"{task.id}:0")
    assert tables[key].sync_status == "backfilling"
    (again,) = requests(tick(apply=False)) or [None]
    assert again is None or again.run_key == request.run_key


@pytest.mark.parametrize("how", ["task", "queued run", "run"])
def test_a_rebackfill_that_somebody_cancelled_is_not_begun_again(
    tick: Any, tables: Any, make_run: Any, runtime: Runtime, log: list[str], how: str
) -> None:
    key = tables.create("a", live=True)
    tables.reconfigure(key)
    tick()
    task_id = tables.live_task(key).id
    if how == "task":
        with runtime.catalog.transaction() as session:
            tasks.request_cancel(session, tasks.find(session, task_id, lock=True))
    else:
        run_id = make_run(Status.CANCELED, key, task_id)
        if how == "run":
            tables.claim(task_id, run_id)
    assert not requests(tick())
    assert tables.get_task(task_id).status == "cancelled"
    assert not requests(tick())
    assert tables[key].sync_status == "pending_rebackfill"
    with runtime.catalog.transaction() as session:
        assert not due_tables.awaiting_rebackfill(session), "no tick looks at it"
        resyncs.request(session, [key], "Changes may have been missed.")
    (request,) = requests(tick())
    assert request.run_config["ops"]["vector_table"]["config"] == {"mode": "sync"}, "what is live is kept true"
    tables.claim(tables.live_task(key).id, "r")
    with runtime.catalog.transaction() as session:
        tasks.complete(session, tables.live_task(key).id, "r", tasks.EMPTY_PROGRESS)
    tables.change(key, next_sync_at=NOON)
    assert schedule_syncs(lambda: runtime, NOON, log.append).skip_message == f"1 syncs begin: {key}."
    with runtime.catalog.transaction() as session:
        tasks.request_cancel(session, tasks.find_live(session, key))
    assert tables[key].sync_status == "pending_rebackfill"
    tables.reconfigure(key, "a third")
    (request,) = requests(tick())
    assert tables.live_task(key).task_type == "rebackfill"


@pytest.mark.parametrize("kind", ["paused", "busy"])
def test_a_newer_configuration_waits(tick: Any, tables: Any, kind: str) -> None:
    key = tables.create("a", live=True)
    if kind == "busy":
        tables.task(key, TaskType.SYNC, created_at=now())
    else:
        with tables.runtime.catalog.transaction() as session:
            vector_tables.pause(vector_tables.find(session, key))
    tables.reconfigure(key)
    assert not requests(tick())


def test_a_deleted_table_ends_its_run_then_goes(
    tick: Any, tables: Any, make_run: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("a", live=True)
    tick()
    task_id = tables.task(key)
    run_id = make_run(Status.STARTED, key, task_id)
    tables.claim(task_id, run_id)
    tables.delete(key)
    tick()
    assert tables.get_task(task_id).cancel_requested
    assert tables.get_task(task_id).status == "running"
    instance.report_run_canceled(instance.get_run_by_id(run_id))
    tick()
    assert tables.get_task(task_id).status == "cancelled"
    assert tables[key].sync_status == "deleting"
    assert not instance.get_dynamic_partitions("vector_tables")


def test_one_table_that_fails_does_not_stop_the_others(
    tick: Any, tables: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    ids = [tables.create(name) for name in "ab"]
    task_ids = [tables.task(key) for key in ids]
    for key, task_id in zip(ids, task_ids, strict=True):
        tables.claim(task_id, make_run(Status.CANCELED, key, task_id))
    cancel = tasks.cancel

    def fails_once(session: Any, task: Any, reason: str) -> None:
        if task.id == task_ids[0]:
            raise ValueError("secret")
        cancel(session, task, reason)

    monkeypatch.setattr(tasks, "cancel", fails_once)
    tick()
    assert [tables.get_task(task_id).status for task_id in task_ids] == ["running", "cancelled"]
    assert "secret" not in " ".join(log)
    assert any("ValueError" in line for line in log)
    monkeypatch.setattr(tasks, "cancel", cancel)
    tick()
    assert tables.get_task(task_ids[0]).status == "cancelled"


def test_what_went_on_by_itself_meanwhile_is_left_alone(
    tick: Any, tables: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    run_id = make_run(Status.SUCCESS, key, task_id)
    tables.claim(task_id, run_id)
    observe = sensor.observe

    def then_it_completes(*arguments: Any) -> Any:
        seen = observe(*arguments)
        if tables.get_task(task_id).status == "running":
            with tables.runtime.catalog.transaction() as session:
                tasks.complete(session, task_id, run_id, tasks.EMPTY_PROGRESS)
        return seen

    monkeypatch.setattr(sensor, "observe", then_it_completes)
    assert not requests(tick())
    assert tables.get_task(task_id).status == "completed"


def test_the_tick_of_ten_thousand_tables_is_short(
    tick: Any, tables: Any, runtime: Runtime, instance: dg.DagsterInstance
) -> None:
    from sqlalchemy import text

    tables.create("a")
    with runtime.catalog.transaction() as session:
        columns = [
            row[0]
            for row in session.execute(
                text("SELECT column_name FROM information_schema.columns WHERE table_name = 'vector_tables'")
            )
        ]
        given = {"id": "'vt_' || n", "name": "'t' || n", "storage_name": "'s' || n", "partition_key": "'s' || n"}
        picked = ", ".join(given.get(name, f'"{name}"') for name in columns)
        names = ", ".join(f'"{name}"' for name in columns)
        session.execute(
            text(f"INSERT INTO vector_tables ({names}) SELECT {picked} FROM vector_tables, generate_series(1, 9999) n")
        )
    tick()
    assert len(instance.get_dynamic_partitions("vector_tables")) == 10_000
    begun = time.perf_counter()
    assert isinstance(tick(), dg.SkipReason)
    assert time.perf_counter() - begun < 2


# the sensors and the schedule as Dagster calls them


def evaluate(sensor: dg.SensorDefinition, instance: dg.DagsterInstance) -> Any:
    resources = {"runtime": RuntimeResource()}
    with dg.build_sensor_context(instance=instance, resources=resources, definitions=defs) as context:
        return sensor.evaluate_tick(context)


def test_no_schedule_ticks_so_often_that_the_timeline_fills_with_runs_that_never_come() -> None:
    assert {schedule.cron_schedule for schedule in defs.schedules or ()} == {"17 3 * * *"}
    assert "sync_sensor" in {sensor.name for sensor in defs.sensors or ()}


def test_the_sync_sensor_as_dagster_calls_it(instance: dg.DagsterInstance, tables: Any) -> None:
    key = tables.create("a", live=True)
    tables.change(key, next_sync_at=long_ago())
    assert evaluate(sync_sensor, instance).skip_message == f"1 syncs begin: {key}."


def test_the_sensor_as_dagster_calls_it(instance: dg.DagsterInstance, tables: Any) -> None:
    key = tables.create("a")
    task_id = tables.task(key)
    data = evaluate(reconcile_sensor, instance)
    assert data.dynamic_partitions_requests[0].partition_keys == [tables.partition(key)]
    (request,) = data.run_requests
    assert request.tags["dagster/partition"] == tables.partition(key)
    assert request.tags["embedd/task_id"] == task_id
    assert evaluate(cleanup_sensor, instance).skip_message == "Nothing to drop."


def test_without_settings_the_ticks_skip_and_say_why(instance: dg.DagsterInstance) -> None:
    get_settings.cache_clear()
    resources._process_runtime.cache_clear()
    for one in (reconcile_sensor, cleanup_sensor):
        assert "EMBEDD_DATABASE_URL" in evaluate(one, instance).skip_message
    skipped = schedule_syncs(RuntimeResource().open, now(), print)
    assert "EMBEDD_DATABASE_URL" in (skipped.skip_message or "")


def test_definitions_are_loadable_without_settings() -> None:
    dg.Definitions.validate_loadable(defs)
    job = defs.resolve_job_def("vector_table_job")
    assert job.executor_def.name == "in_process"
    assert {node.name for node in job.graph.nodes} == {"vector_table", "vector_table_checks"}


# cleaning up


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> Dropping:
    made = Dropping()
    monkeypatch.setattr(teardown, "teardown", made.drop)
    monkeypatch.setattr(teardown, "_drop_set", made.drop)
    return made


class Dropping:
    """Stands for the stores: drops at once, except what is kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: set[str] = set()

    def drop(self, _runtime: Runtime, key: str, *_version: int) -> bool:
        self.calls.append(key)
        if key in self.failing:
            raise VectorStoreUnavailable("The store does not answer.")
        return True


def in_one_place(tables: Any, *keys: str) -> None:
    """Puts these into one customer's database."""
    for key in keys:
        tables.change(key, mode="platform", connection_id=tables[keys[0]].connection_id)


def retire(runtime: Runtime, *keys: str) -> None:
    """Gives each a set that was built and never went live."""
    with runtime.catalog.transaction() as session:
        for key in keys:
            row = VectorSetRow(vector_table_id=key, version=9, config_version=1, configuration={}, created_at=now())
            row.state = VectorSetState.RETIRED.value
            session.add(row)


@pytest.mark.parametrize("kind", ["deleted tables", "replaced sets"])
def test_cleaning_up_tries_again_later_and_goes_on_with_the_others(
    runtime: Runtime, tables: Any, dropping: Dropping, log: list[str], kind: str
) -> None:
    down, neighbour, other = keys = [tables.create(name) for name in "abc"]
    in_one_place(tables, down, neighbour)
    if kind == "deleted tables":
        for key in keys:
            tables.delete(key)
    else:
        retire(runtime, *keys)
    dropping.failing = {down, neighbour}
    delays = Delays()
    skipped = clean_up(lambda: runtime, delays, log.append)
    assert skipped.skip_message == f"Dropped {other if kind == 'deleted tables' else f'set 9 of {other}'}."
    assert "The store does not answer." in log[0]
    assert len({down, neighbour} & set(dropping.calls)) == 1, "the second was not waited for"
    clean_up(lambda: runtime, delays, log.append)
    assert (dropping.calls.count(down), dropping.calls.count(neighbour)) == (1, 1), "each has a delay of its own"
    clean_up(lambda: runtime, delays, log.append)
    assert (dropping.calls.count(down), dropping.calls.count(neighbour)) == (1, 1), "they are tried again after a while"
    assert all(delays.is_due(what, time.monotonic() + 3) for what in delays._failures)


def test_cleaning_up_ends_in_time(
    runtime: Runtime, tables: Any, dropping: Dropping, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [tables.create(name) for name in "abc"]
    retire(runtime, *keys)
    clock = iter(range(0, 1000, 15))  # every look at it comes 15 seconds after the one before
    monkeypatch.setattr(cleanup, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    skipped = clean_up(lambda: runtime, Delays(), log.append)
    assert len(dropping.calls) == 1
    assert skipped.skip_message == f"Dropped set 9 of {dropping.calls[0]}."


def test_cleaning_up_needs_the_catalog(runtime: Runtime) -> None:
    def down() -> Runtime:
        raise CatalogUnavailable("The catalog database does not answer.")

    assert "does not answer" in (clean_up(down, Delays(), print).skip_message or "")


# the schedule

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("0 * * * *", NOON + timedelta(hours=1)),
        ("*/15 * * * *", NOON + timedelta(minutes=15)),
        ("0 3 * * *", NOON + timedelta(hours=15)),
    ],
)
def test_the_next_sync(schedule: str, expected: datetime) -> None:
    assert next_sync_at(schedule, NOON) == expected
    assert next_sync_at(schedule, NOON.astimezone()) == expected


def test_a_newly_live_table_gets_on_the_schedule_and_then_syncs_once_a_time(
    runtime: Runtime, tables: Any, log: list[str], tick: Any
) -> None:
    key = tables.create("a", live=True)
    never_built = tables.create("b")
    quarterly = tables.create("c", live=True, sync_schedule="*/15 * * * *")
    at = NOON

    def go(minutes: int) -> str:
        nonlocal at
        at += timedelta(minutes=minutes)
        return schedule_syncs(lambda: runtime, at, log.append).skip_message or ""

    assert go(0) == "No sync is due."
    assert tables[key].next_sync_at == NOON + timedelta(hours=1)
    assert tables[never_built].next_sync_at is None
    assert go(16) == f"1 syncs begin: {quarterly}."
    assert tables[quarterly].next_sync_at == NOON + timedelta(minutes=30)
    assert go(16) == "No sync is due.", "no second one while the first is live"
    task = tables.live_task(quarterly)
    assert task.task_type == "sync"
    tables.change_task(task.id, created_at=long_ago())
    (request,) = requests(tick())
    assert request.run_config == {"ops": {"vector_table": {"config": {"mode": "sync"}}}}
    tables.claim(task.id, "r")
    with runtime.catalog.transaction() as session:
        tasks.complete(session, task.id, "r", tasks.EMPTY_PROGRESS)
    assert go(0) == f"1 syncs begin: {quarterly}.", "it was due meanwhile"
    assert go(600) == f"1 syncs begin: {key}.", "one sync after ten hours of nothing"
    assert go(1) == "No sync is due."


def test_paused_and_misconfigured_tables_do_not_sync(runtime: Runtime, tables: Any, log: list[str]) -> None:
    past = NOON - timedelta(hours=1)
    paused = tables.create("a", live=True)
    tables.change(paused, next_sync_at=past, paused=True, sync_status="paused")
    wrong = tables.create("b", live=True, sync_schedule="whenever")
    good = tables.create("c", live=True)
    for key in (wrong, good):
        tables.change(key, next_sync_at=past)
    assert schedule_syncs(lambda: runtime, NOON, log.append).skip_message == f"1 syncs begin: {good}."
    assert "whenever" in log[0]
