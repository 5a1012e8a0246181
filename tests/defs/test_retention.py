"""What is forgotten and what is not, over Dagster's own PostgreSQL storage with real runs in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import psycopg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.storage.compute_log_manager import ComputeIOType
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable
from sqlalchemy import select

from embedd_dagster.catalog.clock import now
from embedd_dagster.core import ids
from embedd_dagster.definitions import defs
from embedd_dagster.defs import resources, retention
from embedd_dagster.defs.backfills import ASSET_KEY
from embedd_dagster.defs.cdc.job import follow_job
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.retention import purge_job, purge_runs, purge_schedule, purge_tasks
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import get_settings
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.defs.test_asset import Engine, engine

__all__ = ["engine"]

LATER = timedelta(minutes=1)
ENDINGS = {
    Status.SUCCESS: dg.DagsterEventType.RUN_SUCCESS,
    Status.FAILURE: dg.DagsterEventType.RUN_FAILURE,
    Status.CANCELED: dg.DagsterEventType.RUN_CANCELED,
}
VECTOR_TABLE_JOB = defs.resolve_job_def("vector_table_job")


@pytest.fixture
def instance(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance as `dagster.yaml` makes it: PostgreSQL and files."""
    name = f"dagster_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        url = postgres.url(name).replace("postgresql://", "postgresql+psycopg2://")
        with dg.instance_for_test({"storage": {"postgres": {"postgres_url": url}}}, temp_dir=str(tmp_path)) as made:
            yield made
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def past_run(instance: dg.DagsterInstance) -> Callable[..., str]:
    """A run that has ended, with the materializations it made."""

    def make(
        *vector_table_ids: str,
        job: dg.JobDefinition = VECTOR_TABLE_JOB,
        status: Status = Status.SUCCESS,
        assets: set[dg.AssetKey] | None = None,
        tags: dict[str, str] | None = None,
    ) -> str:
        config = {"ops": {"follow_changes": {"config": {"connection_id": "conn_1"}}}} if job is follow_job else {}
        run = instance.create_run_for_job(
            job, status=Status.STARTED, tags=tags or {}, asset_selection=assets, run_config=config
        )
        for key in vector_table_ids:
            event = dg.DagsterEvent(
                event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
                job_name=job.name,
                event_specific_data=_materialization_of(key),
            )
            instance.report_dagster_event(event, run.run_id)
        if status in ENDINGS:
            instance.report_dagster_event(dg.DagsterEvent(ENDINGS[status].value, job.name), run.run_id)
        return run.run_id

    return make


def _materialization_of(key: str) -> Any:
    from dagster._core.events import StepMaterializationData

    return StepMaterializationData(dg.AssetMaterialization(ASSET_KEY, partition=key, metadata={"rows": 1}), [])


def kept(instance: dg.DagsterInstance) -> set[str]:
    return {run.run_id for run in instance.get_runs()}


def test_old_runs_go_with_their_events_and_logs(instance: dg.DagsterInstance, runtime: Runtime, past_run: Any) -> None:
    instance.add_dynamic_partitions("vector_tables", ["vt_a", "vt_b"])
    old = [past_run("vt_a"), past_run("vt_a", "vt_b", job=follow_job), past_run(status=Status.FAILURE)]
    a, b = past_run("vt_a"), past_run("vt_b", job=follow_job)
    deleted = past_run("vt_deleted")
    manager = instance.compute_log_manager
    with manager.open_log_stream([old[0], "compute_logs", "step"], ComputeIOType.STDERR) as stream:
        assert stream is not None
        stream.write("said")
    folder = Path(manager.get_captured_local_path([old[0], "compute_logs", "step"], "err")).parent  # type: ignore[attr-defined]
    assert folder.exists()
    before_any = now() - timedelta(days=1)
    assert purge_runs(instance, runtime, before_any, print) == 0
    assert purge_runs(instance, runtime, now() + LATER, print) == 4
    assert kept(instance) == {a, b}
    assert deleted not in kept(instance)
    assert instance.all_logs(old[0]) == []
    assert not folder.exists()
    for key, run_id in (("vt_a", a), ("vt_b", b)):
        filtered = dg.AssetRecordsFilter(asset_key=ASSET_KEY, asset_partitions=[key])
        (record,) = instance.fetch_materializations(filtered, limit=10).records
        assert record.run_id == run_id
    assert instance.get_materialized_partitions(ASSET_KEY) == {"vt_a", "vt_b"}
    assert purge_runs(instance, runtime, now() + LATER, print) == 0


def test_of_real_runs_the_latest_of_each_partition_is_left(
    instance: dg.DagsterInstance, runtime: Runtime, tables: Any, engine: Engine
) -> None:
    keys = [tables.partition(tables.create(name)) for name in ("a", "b")]
    instance.add_dynamic_partitions("vector_tables", keys)
    latest = set()
    for key in keys:
        made = [
            VECTOR_TABLE_JOB.execute_in_process(
                instance=instance,
                partition_key=key,
                run_config={"ops": {"vector_table": {"config": {"mode": "sync" if number else "backfill"}}}},
            )
            for number in range(3)
        ]
        latest.add(made[-1].run_id)
    assert purge_runs(instance, runtime, now() + LATER, print) == 4
    assert kept(instance) == latest
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        said = connection.execute(select(AssetCheckExecutionsTable.c.run_id)).scalars().all()
    assert set(said) == latest
    assert len(said) == 2, "the check of two partitions"
    assert instance.get_latest_data_version_record(ASSET_KEY, partition_key=keys[0]) is not None


def test_runs_of_others_and_of_live_tasks_stay(
    instance: dg.DagsterInstance, runtime: Runtime, past_run: Any, tables: Any
) -> None:
    @dg.op
    def other_op() -> None: ...

    @dg.job
    def other_job() -> None:
        other_op()

    @dg.asset
    def other_asset() -> None: ...

    clicked = dg.Definitions.merge(defs, dg.Definitions(assets=[other_asset])).resolve_implicit_global_asset_job_def()
    key = tables.create("a")
    live, done = tables.task(key), ids.new_id("task", 1_700_000_000)
    stay = {
        past_run(job=other_job),
        past_run(job=clicked, assets={other_asset.key}),
        past_run(job=clicked, assets={other_asset.key, ASSET_KEY}),
        past_run(status=Status.STARTED),
        past_run(status=Status.FAILURE, tags={"embedd/task_id": live}),
    }
    past_run(job=clicked, assets={ASSET_KEY})
    past_run(status=Status.CANCELED, tags={"embedd/task_id": done})
    assert purge_runs(instance, runtime, now() + LATER, print) == 2
    assert kept(instance) == stay


def test_every_page_is_seen_also_behind_runs_that_stay(
    instance: dg.DagsterInstance, runtime: Runtime, past_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_RUNS_AT_ONCE", 3)
    keys = [f"vt_{number}" for number in range(8)]
    instance.add_dynamic_partitions("vector_tables", keys)
    latest = set()
    for number, key in enumerate(keys):
        past_run(key, status=Status.SUCCESS if number % 2 else Status.FAILURE)
        latest.add(past_run(key))
    assert purge_runs(instance, runtime, now() + LATER, print) == len(keys)
    assert kept(instance) == latest


def test_what_takes_too_long_is_left_for_the_next_night(
    instance: dg.DagsterInstance, runtime: Runtime, past_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_RUNS_AT_ONCE", 2)
    monkeypatch.setattr(retention, "_LONGEST_SECONDS", -1)
    for _ in range(5):
        past_run()
    log: list[str] = []
    assert purge_runs(instance, runtime, now() + LATER, log.append) == 2
    assert "next purge" in log[0]
    assert len(kept(instance)) == 3


def test_old_tasks_go_and_live_ones_stay(runtime: Runtime, tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_TASKS_AT_ONCE", 2)
    key = tables.create("a")

    def ended(at: datetime) -> str:
        task_id: str = tables.task(key)
        tables.claim(task_id, "r")
        tables.change_task(task_id, status="completed", ended_at=at)
        tables.change(key, sync_status="pending")
        aged = ids.new_id("task", int(at.timestamp()) - 5)
        tables.change_task(task_id, id=aged)
        return aged

    old = [ended(now() - timedelta(days=40)) for _ in range(5)]
    recent = ended(now() - timedelta(days=20))
    live = tables.task(key)
    tables.change_task(live, id=(aged := ids.new_id("task", int(now().timestamp()) - 90 * 86_400)))
    assert purge_tasks(runtime, now() - timedelta(days=30)) == len(old)
    assert [tables.get_task(task_id) for task_id in old] == [None] * len(old)
    assert tables.get_task(recent) is not None
    assert tables.get_task(aged).status == "pending"


@pytest.fixture
def retention_days(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets EMBEDD_RUN_RETENTION_DAYS for this process."""

    def choose(days: int) -> None:
        monkeypatch.setenv("EMBEDD_RUN_RETENTION_DAYS", str(days))
        get_settings.cache_clear()
        resources._process_runtime.cache_clear()

    return choose


def test_the_schedule_and_the_job_as_dagster_calls_them(
    instance: dg.DagsterInstance, past_run: Any, retention_days: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = past_run()

    def tick() -> Any:
        with dg.build_schedule_context(instance, resources={"runtime": RuntimeResource()}) as context:
            return purge_schedule.evaluate_tick(context)

    def execute() -> dg.ExecuteInProcessResult:
        monkeypatch.setattr(retention, "now", lambda: now() + timedelta(days=8))
        return defs.resolve_job_def("purge_job").execute_in_process(instance=instance)

    retention_days(0)
    assert "everything is kept" in tick().skip_message
    assert execute().success
    assert old in kept(instance)
    retention_days(7)
    assert len(tick().run_requests) == 1
    result = execute()
    assert result.success
    assert result.run_id in kept(instance), "it is under way"
    assert old not in kept(instance)


def test_it_is_on_by_default() -> None:
    assert purge_schedule.default_status is dg.DefaultScheduleStatus.RUNNING
    assert purge_job.name in {job.name for job in defs.jobs or ()}
