"""A run whose process is gone holds its vector table for less than a minute, in every order of events.

Real run records, a real catalog, and a code server that has just been restarted: nothing is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.storage.runs.schema import RunsTable
from sqlalchemy import update

from embedd_dagster.catalog import run_heartbeats, tasks
from embedd_dagster.catalog.tables import RunHeartbeat
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.reconcile import observe
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.reconcile.sensor import reconcile
from embedd_dagster.defs.stopping import WorkerStopped
from embedd_dagster.engine.run import _end
from embedd_dagster.engine.runtime import Runtime


@pytest.fixture
def tick(
    instance: dg.DagsterInstance, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[dg.RunRequest]]:
    # the process of the tests may run for an hour
    monkeypatch.setattr(observe, "CODE_SERVER_STARTED_AT", datetime.now(UTC))

    def run() -> list[dg.RunRequest]:
        result = reconcile(instance, lambda: runtime, Memory(), print)
        return list(result.run_requests or ()) if isinstance(result, dg.SensorResult) else []

    return run


def last_heard_of(instance: dg.DagsterInstance, runtime: Runtime, run_id: str, seconds: float, *, beat: bool) -> None:
    """Makes it so long ago that anything was heard of the run."""
    instant = datetime.now(UTC) - timedelta(seconds=seconds)
    storage = instance.run_storage
    assert isinstance(storage, SqlRunStorage)
    values = {"create_timestamp": instant, "update_timestamp": instant, "start_time": instant.timestamp()}
    with storage.connect() as connection:
        connection.execute(update(RunsTable).where(RunsTable.c.run_id == run_id).values(**values))
    if beat:
        with runtime.catalog.transaction() as session:
            session.merge(RunHeartbeat(run_id=run_id, heartbeat_at=instant))


# what was the last thing that the run did before its process was killed
ORDERS = {
    "it was starting": (Status.STARTING, "pending", False),
    "it had begun, and not claimed its task": (Status.STARTED, "pending", True),
    "it had begun, and given no heartbeat yet": (Status.STARTED, "pending", False),
    "it had claimed its task": (Status.STARTED, "claimed", True),
    "it had given its task back": (Status.STARTED, "given back", True),
    "it had completed its task, and checked the asset": (Status.STARTED, "completed", True),
    "somebody had cancelled it, and it had not heard": (Status.CANCELING, "claimed", True),
    "somebody had cancelled it, and it had ended its task": (Status.CANCELING, "cancelled", True),
}


@pytest.mark.parametrize(("status", "did", "beat"), ORDERS.values(), ids=ORDERS.keys())
def test_a_run_whose_process_is_gone_frees_its_table_within_a_minute(
    tick: Any,
    tables: Any,
    runtime: Runtime,
    make_run: Any,
    instance: dg.DagsterInstance,
    status: Status,
    did: str,
    beat: bool,
) -> None:
    key = tables.create("a", live=True)
    task_id = tables.task(key)
    run_id = make_run(status, key, task_id)
    heard_of = datetime.now(UTC) - timedelta(seconds=50)
    if did != "pending":
        tables.claim(task_id, run_id, heartbeat_at=heard_of)
    with runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        if did == "given back":
            tasks.hand_back(session, task, "The process of the run was told to stop.")
        elif did == "completed":
            tasks.complete(session, task_id, run_id, tasks.EMPTY_PROGRESS)
        elif did == "cancelled":
            tasks.cancel(session, task)
    last_heard_of(instance, runtime, run_id, 50, beat=beat)
    requests = tick() + tick()
    assert instance.get_run_by_id(run_id).is_finished
    if did in ("completed", "cancelled") or status is Status.CANCELING:
        assert not requests
        assert tables.live_task(key) is None
    else:
        assert {request.run_key for request in requests} == {f"{task_id}:{run_id}"}


@pytest.mark.parametrize("status", [Status.STARTING, Status.STARTED, Status.CANCELING])
def test_a_run_that_was_heard_of_a_moment_ago_is_left_alone(
    tick: Any, tables: Any, runtime: Runtime, make_run: Any, instance: dg.DagsterInstance, status: Status
) -> None:
    key = tables.create("a")
    run_id = make_run(status, key, tables.task(key))
    last_heard_of(instance, runtime, run_id, 20, beat=True)
    assert not tick()
    assert instance.get_run_by_id(run_id).status is status


def test_the_heartbeat_of_a_run_goes_on_until_its_end(runtime: Runtime) -> None:
    object.__setattr__(runtime.settings, "heartbeat_seconds", 0.01)

    def latest() -> datetime | None:
        with runtime.catalog.transaction() as session:
            return run_heartbeats.latest(session, ["r", "other"]).get("r")

    def wait_for_one_after(before: datetime | None) -> datetime:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = latest()
            if found is not None and (before is None or found > before):
                return found
            time.sleep(0.01)
        raise AssertionError("no heartbeat")

    with heartbeat(runtime, "r", print):
        wait_for_one_after(wait_for_one_after(None))
    last = latest()
    assert last is not None
    with runtime.catalog.transaction() as session:
        run_heartbeats.forget(session, last)
    assert latest() == last
    with runtime.catalog.transaction() as session:
        run_heartbeats.forget(session, last + timedelta(seconds=1))
    assert latest() is None


def test_any_number_of_restarts_may_fall_into_one_task(
    tick: Any, tables: Any, runtime: Runtime, make_run: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("a")
    task_id = tables.task(key)

    for _ in range(4):
        run_id = make_run(Status.STARTED, key, task_id)
        tables.claim(task_id, run_id)
        _end(runtime, task_id, run_id, WorkerStopped("The process of the run was told to stop."))
        instance.report_run_failed(instance.get_run_by_id(run_id))
        (request,) = tick()
        assert request.run_key == f"{task_id}:{run_id}"
    assert (tables.get_task(task_id).status, tables.get_task(task_id).attempts) == ("pending", 0)
