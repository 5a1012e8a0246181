"""What a tick may take: its time, and what it leaves behind on disk."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.test_utils import instance_for_test

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.clock import now
from embedd_dagster.definitions import defs
from embedd_dagster.defs.cdc.sensor import follower_sensor
from embedd_dagster.defs.cleanup import cleanup_sensor
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.reconcile.sensor import reconcile, reconcile_sensor
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.retention import purge_backfills
from embedd_dagster.defs.schedules import sync_sensor
from embedd_dagster.defs.tick_logs import purge_tick_logs
from embedd_dagster.engine.runtime import Runtime


class Clock:
    """Stands still except during the work that is done."""

    def __init__(self) -> None:
        self.instant = 0.0

    def __call__(self) -> float:
        return self.instant


def test_deleting_many_tables_with_queued_backfills_does_not_delay_the_start_of_others(
    instance: dg.DagsterInstance, runtime: Runtime, tables: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, settled = Clock(), []
    cancel = tasks.cancel

    def slow_cancel(session: Any, task: Any, *reason: Any) -> None:
        clock.instant += 2
        settled.append(task.id)
        cancel(session, task, *reason)

    monkeypatch.setattr(tasks, "cancel", slow_cancel)
    deleted = [tables.create(f"d{number}") for number in range(12)]
    queued = [make_run(Status.QUEUED, key, tables.task(key)) for key in deleted]
    for key in deleted:
        tables.delete(key)
    other = tables.create("other")
    task_id = tables.task(other, created_at=now() - timedelta(seconds=10))
    memory, left = Memory(), []
    result = reconcile(instance, lambda: runtime, memory, left.append, clock)
    assert isinstance(result, dg.SensorResult)
    assert [request.tags["embedd/task_id"] for request in result.run_requests or ()] == [task_id]
    changes = result.dynamic_partitions_requests or ()
    assert tables.partition(other) in {key for change in changes for key in change.partition_keys}
    assert len(settled) == 5, "ten seconds' work"
    assert any("left for the next tick" in line for line in left)
    for _ in range(4):
        reconcile(instance, lambda: runtime, memory, left.append, clock)
    assert len(settled) == 12
    assert {instance.get_run_by_id(run_id).status for run_id in queued} == {Status.CANCELED}


def test_partitions_are_deleted_so_many_per_tick(instance: dg.DagsterInstance, runtime: Runtime, tables: Any) -> None:
    instance.add_dynamic_partitions("vector_tables", [f"vt_{number}" for number in range(130)])
    new = tables.create("new")
    result = reconcile(instance, lambda: runtime, Memory(), print)
    assert isinstance(result, dg.SensorResult)
    added, deleted = result.dynamic_partitions_requests or ()
    assert (added.partition_keys, len(deleted.partition_keys)) == ([tables.partition(new)], 100)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with instance_for_test(temp_dir=str(tmp_path)) as made:
        yield made


def files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*.err") if path.is_file()]


def test_a_tick_that_has_nothing_to_say_leaves_no_file(
    on_disk: dg.DagsterInstance, tables: Any, tmp_path: Path
) -> None:
    resources = {"runtime": RuntimeResource()}
    repository = defs.get_repository_def()
    for sensor in (reconcile_sensor, sync_sensor, cleanup_sensor, follower_sensor):
        with dg.build_sensor_context(
            instance=on_disk, resources=resources, repository_def=repository, sensor_name=sensor.name
        ) as context:
            sensor.evaluate_tick(context)
    assert files(tmp_path) == []


def test_the_log_files_of_forgotten_ticks_are_deleted(on_disk: dg.DagsterInstance, tmp_path: Path) -> None:
    location = GrpcServerCodeLocationOrigin(host="localhost", port=1, location_name="embedd")
    origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), "reconcile_sensor")
    on_disk.add_instigator_state(
        InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, SensorInstigatorData())
    )
    ticks = []
    for number in range(2):
        instant = (now() - timedelta(days=2 - number)).timestamp()
        data = TickData(
            origin.get_id(), "reconcile_sensor", InstigatorType.SENSOR, TickStatus.SUCCESS, instant, run_ids=["r"],
            selector_id=origin.get_selector().get_id(),
        )  # fmt: skip
        tick = on_disk.create_tick(data)
        key = ["__repository__", "reconcile_sensor", str(tick.tick_id)]
        with on_disk.compute_log_manager.open_log_stream(key, _stderr()) as stream:
            stream.write("{}\n")
        ticks.append(tick)
    assert len(files(tmp_path)) == 2
    assert purge_tick_logs(on_disk, lambda: False) == 0
    before = (now() - timedelta(days=1, hours=12)).timestamp()
    on_disk.purge_ticks(origin.get_id(), origin.get_selector().get_id(), before)
    assert purge_tick_logs(on_disk, lambda: True) == 0, "out of time"
    assert purge_tick_logs(on_disk, lambda: False) == 1
    assert [path.stem for path in files(tmp_path)] == [str(ticks[1].tick_id)]


def _stderr() -> Any:
    from dagster._core.storage.compute_log_manager import ComputeIOType

    return ComputeIOType.STDERR


def test_old_backfills_are_deleted_and_others_stay(instance: dg.DagsterInstance) -> None:
    old, new = datetime.now(UTC) - timedelta(days=40), datetime.now(UTC)

    def add(backfill_id: str, status: BulkActionStatus, instant: datetime, *assets: str) -> None:
        instance.add_backfill(
            PartitionBackfill(
                backfill_id, status, False, {"a": "b"}, instant.timestamp(),
                asset_selection=[dg.AssetKey(name) for name in assets],
            )
        )  # fmt: skip

    add("old", BulkActionStatus.COMPLETED_SUCCESS, old, "vector_table")
    add("failed", BulkActionStatus.FAILED, old, "vector_table")
    add("at work", BulkActionStatus.REQUESTED, old, "vector_table")
    add("others", BulkActionStatus.COMPLETED_SUCCESS, old, "vector_table", "dashboard")
    add("new", BulkActionStatus.COMPLETED_SUCCESS, new, "vector_table")
    assert purge_backfills(instance, new - timedelta(days=30)) == 2
    assert {backfill.backfill_id for backfill in instance.get_backfills()} == {"at work", "others", "new"}
