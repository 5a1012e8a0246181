"""The code of docs/how-to/your-own-schedules.md, taken from there and run: schedules, sensors and conditions that sync."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest

from embedd_dagster.catalog import vector_tables
from embedd_dagster.core.run_names import TASK_TAG
from embedd_dagster.core.status import SyncStatus
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.defs import resources
from embedd_dagster.defs.tags import OUTCOME_TAG
from embedd_dagster.settings import get_settings
from tests.engine.conftest import Product

DOCUMENT = Path(__file__).parents[2] / "docs/how-to/your-own-schedules.md"
pytestmark = pytest.mark.parametrize("product", [Mode.PLATFORM], ids=["pgvector"], indirect=True)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:  # on disk: a tick of a schedule opens it once more
        yield made


@pytest.fixture
def location(product: Product, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the document, in a process set up as a code server is."""
    settings = product.runtime.settings
    monkeypatch.setenv("PRODUCTS_VECTOR_TABLE", product.table().partition_key)
    monkeypatch.setenv("EMBEDD_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", settings.encryption_keys[0].get_secret_value())
    monkeypatch.setenv("EMBEDD_QDRANT_URL", settings.qdrant_url)
    code = re.search(r"```python\n(\"\"\"my_embedd\.py.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code is not None
    path = tmp_path / "my_embedd.py"
    path.write_text(code[1])
    get_settings.cache_clear()
    resources._process_runtime.cache_clear()
    spec = importlib.util.spec_from_file_location("my_embedd", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    resources._process_runtime.cache_clear()
    get_settings.cache_clear()


def test_a_code_server_loads_it(location: ModuleType) -> None:
    """As `embedd up --code-location` and the compose file have it loaded: by the module's name."""
    path = Path(str(location.__file__))
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "--module-name", path.stem]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def built(location: ModuleType, product: Product, instance: dg.DagsterInstance) -> Product:
    """Built by a run of Dagster's, as the API would have it; then rows have changed."""
    instance.add_dynamic_partitions("vector_tables", [product.table().partition_key])
    assert execute(location, instance, dg.RunRequest(partition_key=product.table().partition_key)).success
    change_rows(product)
    return product


def change_rows(product: Product) -> None:
    product.sql("UPDATE products SET body = md5(random()::text) WHERE id <= 5")


def tick(location: ModuleType, instance: dg.DagsterInstance, schedule: dg.ScheduleDefinition) -> list[dg.RunRequest]:
    """What a schedule asks for one morning."""
    repository = location.defs.get_repository_def()
    morning = datetime(2026, 1, 5, 5, tzinfo=UTC)
    with dg.build_schedule_context(instance, morning, repository_def=repository) as context:
        return list(schedule.evaluate_tick(context).run_requests or ())


def execute(location: ModuleType, instance: dg.DagsterInstance, request: Any) -> dg.ExecuteInProcessResult:
    """What the daemon does with a request, in this process."""
    if request.asset_selection:
        definitions: dg.Definitions = location.defs
        job = definitions.resolve_implicit_global_asset_job_def()
        job = job.get_subset(asset_selection=set(request.asset_selection))
    else:
        job = location.defs.resolve_job_def("vector_table_job")
    return job.execute_in_process(
        instance=instance,
        partition_key=request.partition_key,
        run_config=request.run_config,
        tags=dict(request.tags),
        raise_on_error=False,
    )


def assert_synced(product: Product, instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> None:
    assert result.success
    task = product.latest_task()
    assert (task.task_type, task.status, task.dagster_run_id) == ("sync", "completed", result.run_id)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[TASK_TAG] == task.id
    (made,) = result.asset_materializations_for_node("vector_table")
    assert made.partition == product.table().partition_key
    assert made.metadata["rows_embedded"].value == 5
    product.assert_true_to_source()


def test_the_code_location_has_all_of_embedd_and_of_ours(location: ModuleType) -> None:
    dg.Definitions.validate_loadable(location.defs)
    names = {sensor.name for sensor in location.defs.sensors or ()}
    assert {"reconcile_sensor", "cleanup_sensor", "sync_what_was_written", "automation"} <= names
    assert location.defs.resolve_job_def("vector_table_job").executor_def.name == "in_process"


def test_a_schedule_syncs_one_vector_table(location: ModuleType, built: Product, instance: dg.DagsterInstance) -> None:
    (request,) = tick(location, instance, location.products_at_six)
    assert_synced(built, instance, execute(location, instance, request))


def test_a_schedule_syncs_every_vector_table_that_was_built(
    location: ModuleType, built: Product, instance: dg.DagsterInstance
) -> None:
    instance.add_dynamic_partitions("vector_tables", ["vt_neverbuilt"])
    (request,) = tick(location, instance, location.everything_every_morning)
    assert request.run_key == f"2026-01-05:{built.table().partition_key}"
    assert_synced(built, instance, execute(location, instance, request))


def test_a_sensor_syncs_what_was_written(location: ModuleType, built: Product, instance: dg.DagsterInstance) -> None:
    cursor = None

    def tick() -> list[dg.RunRequest]:
        nonlocal cursor
        context = dg.SensorEvaluationContext(
            instance_ref=instance.get_ref(),
            last_tick_completion_time=None,
            last_run_key=None,
            cursor=cursor,
            repository_name=None,
            repository_def=location.defs.get_repository_def(),
        )
        with context:
            data = location.sync_what_was_written.evaluate_tick(context)
        cursor = data.cursor
        return list(data.run_requests)

    assert tick() == []
    for table in ("public.products", "public.other", "public.products"):
        instance.report_runless_asset_event(dg.AssetMaterialization("source_table", metadata={"table": table}))
    (request,) = tick()
    assert_synced(built, instance, execute(location, instance, request))
    assert tick() == []


def test_conditions_sync_at_night_and_follow_what_changed(
    location: ModuleType, built: Product, instance: dg.DagsterInstance
) -> None:
    instance.add_dynamic_partitions("vector_tables", ["vt_neverbuilt"])
    evening = datetime(2026, 1, 5, 22, tzinfo=UTC)
    cursor = None

    def wanted(instant: datetime) -> dict[str, set[str]]:
        nonlocal cursor
        evaluated = dg.evaluate_automation_conditions(location.defs, instance, evaluation_time=instant, cursor=cursor)
        cursor = evaluated.cursor
        keys = [location.vector_table.key, location.search_quality.key]
        return {
            key.to_user_string(): set(evaluated.get_requested_partitions(key))  # type: ignore[arg-type]
            for key in keys
            if evaluated.get_num_requested(key)
        }

    assert wanted(evening) == {}, "nothing has happened since it watches"
    assert wanted(evening + timedelta(hours=1)) == {}
    asked = wanted(evening + timedelta(hours=4))
    assert asked.pop("vector_table") == {built.table().partition_key}, "not what never was built"
    assert asked == {}
    request = dg.RunRequest(
        partition_key=built.table().partition_key,
        asset_selection=[location.vector_table.key],
        tags={**location.automation.run_tags, "dagster/from_automation_condition": "true"},
    )
    assert_synced(built, instance, execute(location, instance, request))
    assert wanted(evening + timedelta(hours=5)) == {"search_quality": {built.table().partition_key}}
    assert execute(location, instance, request).success, "a sync that finds nothing to do"
    assert wanted(evening + timedelta(hours=6)) == {}


def test_a_paused_vector_table_is_left_alone_but_for_a_person(
    location: ModuleType, built: Product, instance: dg.DagsterInstance
) -> None:
    with built.runtime.catalog.transaction() as session:
        vector_tables.pause(vector_tables.get(session, built.environment_id, built.vector_table_id, lock=True))
    (request,) = tick(location, instance, location.products_at_six)
    task = built.latest_task()
    result = execute(
        location, instance, request.with_replaced_attrs(tags={**request.tags, "dagster/schedule_name": "s"})
    )
    assert result.success
    assert result.asset_materializations_for_node("vector_table") == []
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[OUTCOME_TAG] == "paused"
    assert built.latest_task().id == task.id
    by_hand = dg.RunRequest(partition_key=request.partition_key, run_config=request.run_config)
    assert_synced(built, instance, execute(location, instance, by_hand))
    assert SyncStatus(built.table().sync_status) is SyncStatus.PAUSED
