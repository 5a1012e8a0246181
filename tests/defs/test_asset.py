"""The asset, run by Dagster in this process, over a real catalog and an engine that only pretends to embed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from embedd_dagster.catalog import tasks, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.core.run_names import TASK_TAG
from embedd_dagster.core.status import VectorSetState
from embedd_dagster.definitions import defs
from embedd_dagster.defs import assets, checks
from embedd_dagster.defs.assets import RunMode, VectorTableConfig
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tags import OUTCOME_TAG
from embedd_dagster.defs.verdicts import CHECK_NAME, judge
from embedd_dagster.engine.inspect import LiveSetInspection
from embedd_dagster.engine.report import RunReport
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import (
    EmbeddingRejected,
    NotFound,
    RunCancelled,
    RunSuperseded,
    SourceUnavailable,
    TransientError,
)

GOOD = LiveSetInspection(
    source_rows=10, point_count=8, skipped_count=1, failed_count=1, sampled=8, dimensions_wrong=0, hash_mismatches=0
)


class Engine:
    """Keeps the catalog as the real engine does."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.during: Callable[[], None] | None = None
        self.embedded = 7

    def __call__(self, runtime: Runtime, task_id: str, run_id: str, *, log: Any, should_stop: Any) -> RunReport:
        with runtime.catalog.transaction() as session:
            task = tasks.claim(session, task_id, run_id)
        try:
            if self.during:
                self.during()
            if should_stop():
                raise RunCancelled("The run was asked to end.")
            if self.fails:
                raise self.fails
        except RunSuperseded:
            raise
        except Exception as error:
            with runtime.catalog.transaction() as session:
                task = tasks.find(session, task_id, lock=True)
                if isinstance(error, RunCancelled):
                    tasks.cancel(session, task)
                else:
                    tasks.fail(session, task, str(error), retry=isinstance(error, TransientError))
            raise
        with runtime.catalog.transaction() as session:
            table = vector_tables.find(session, task.target_id)
            if table.live_version is None:
                session.add(
                    VectorSetRow(
                        vector_table_id=table.id,
                        version=1,
                        state=VectorSetState.BUILDING.value,
                        config_version=1,
                        configuration=table.configuration.to_json(),
                        key_type="integer",
                        created_at=now(),
                    )
                )
                session.flush()
                vector_sets.mark_live(session, table, vector_sets.get(session, table.id, 1))
            tasks.complete(session, task_id, run_id, task.progress)
        return RunReport(
            vector_table_id=task.target_id,
            name="recipes",
            source_table="public.recipes",
            storage_name="vt_12345678_recipes",
            platform_vector_ref=None,
            task_id=task_id,
            task_type=task.task_type,
            version=1,
            config_version=1,
            model="m",
            rows_read=10,
            rows_embedded=self.embedded,
            rows_reused=1,
            rows_rewritten=0,
            rows_deleted=0,
            rows_skipped=1,
            rows_failed=1,
            rows_truncated=0,
            tokens=100,
            cost_usd=0.5,
            requests=2,
            retries=0,
            rows_per_second=5.0,
            total_rows=10,
            point_count=8,
            seconds={"load": 1.5},
            sample=[{"id": 1, "at": now()}],
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(assets, "run_task", made)
    monkeypatch.setattr(checks, "inspect_live_set", lambda *_: GOOD)
    return made


@pytest.fixture
def materialize(instance: dg.DagsterInstance, engine: Engine, tables: Any) -> Callable[..., dg.ExecuteInProcessResult]:
    def run(vector_table_id: str, task_id: str | None = None, **config: Any) -> dg.ExecuteInProcessResult:
        partition_key = tables.partition(vector_table_id)
        instance.add_dynamic_partitions("vector_tables", [partition_key])
        return dg.materialize(
            [assets.source_table, assets.vector_table, checks.vector_table_checks],
            instance=instance,
            partition_key=partition_key,
            resources={"runtime": RuntimeResource()},
            run_config=dg.RunConfig(ops={"vector_table": VectorTableConfig(**config)}),
            tags={TASK_TAG: task_id} if task_id else {},
            raise_on_error=False,
        )

    return run


def materializations(result: dg.ExecuteInProcessResult) -> list[dg.AssetMaterialization]:
    return result.asset_materializations_for_node("vector_table")


def failure(result: dg.ExecuteInProcessResult) -> dg.DagsterEvent:
    (event,) = [event for event in result.all_events if event.is_step_failure]
    return event


def test_a_task_of_the_api_is_done_and_described(materialize: Any, tables: Any, instance: dg.DagsterInstance) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    result = materialize(key, task_id)
    assert result.success
    assert tables.get_task(task_id).status == "completed"
    assert tables.get_task(task_id).dagster_run_id == result.run_id
    assert tables[key].sync_status == "synced"
    (made,) = materializations(result)
    assert made.partition == tables.partition(key)
    metadata = {name: value.value for name, value in made.metadata.items()}
    assert metadata["dagster/row_count"] == 10
    assert metadata["rows_embedded"] == 7
    assert metadata["cost_usd"] == 0.5
    assert metadata["seconds/load"] == 1.5
    assert metadata["vector_table"] == f"http://api.test/v1/vector-tables/{key}"
    assert metadata["sample"][0]["id"] == 1
    assert made.tags["dagster/data_version"] == "v1"
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.check_name, evaluation.passed) == (CHECK_NAME, False)
    assert evaluation.description == "1 rows were refused by the provider or the store."
    assert evaluation.partition == tables.partition(key)


def test_a_materialization_begins_with_what_it_is_and_where_to_find_it(materialize: Any, tables: Any) -> None:
    key = tables.create("t")
    (made,) = materializations(materialize(key))
    first = [(name, value.value) for name, value in made.metadata.items()][:6]
    assert first[:5] == [
        ("name", "recipes"),
        ("source_table", "public.recipes"),
        ("embedding_model", "m"),
        ("vector_table", f"http://api.test/v1/vector-tables/{key}"),
        ("vectors", "http://127.0.0.1:1/collections/vt_12345678_recipes"),
    ]
    assert first[5][0] == "task"


def test_a_run_launched_in_the_ui_gets_the_tags_that_others_have_from_the_launch_on(
    materialize: Any, tables: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("product-search")
    tags = instance.get_run_by_id(materialize(key).run_id).tags
    assert (tags["embedd/name"], tags["embedd/task_type"]) == ("product-search", "backfill")
    assert tags["dagster/partition"] == tables[key].storage_name


def test_a_run_with_the_id_as_its_partition_key_is_done_as_before(
    tables: Any, engine: Engine, instance: dg.DagsterInstance
) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    instance.add_dynamic_partitions("vector_tables", [key])
    result = dg.materialize(
        [assets.source_table, assets.vector_table, checks.vector_table_checks],
        instance=instance,
        partition_key=key,
        resources={"runtime": RuntimeResource()},
        tags={TASK_TAG: task_id},
    )
    assert tables.get_task(task_id).status == "completed"
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.partition == key
    assert evaluation.metadata["source_rows"].value == GOOD.source_rows


def test_a_partition_that_no_vector_table_has_fails_clearly_and_is_not_added(
    engine: Engine, runtime: Runtime, instance: dg.DagsterInstance
) -> None:
    key = "vt_12345678_typed-by-hand"
    job = defs.resolve_job_def("vector_table_job")
    context = SimpleNamespace(
        run=SimpleNamespace(run_id="r", tags={}, parent_run_id=None), partition_key=key, instance=instance
    )
    with pytest.raises(NotFound) as raised:
        assets.find_or_create_task(runtime, context, VectorTableConfig())  # type: ignore[arg-type]
    assert raised.value.message == f"No vector table has the partition {key!r}."
    result = job.execute_in_process(
        instance=instance,
        tags={"dagster/partition": key},
        resources={"runtime": RuntimeResource()},
        raise_on_error=False,
    )
    assert failure(result).step_failure_data.user_failure_data.description == raised.value.message
    assert not instance.has_dynamic_partition("vector_tables", key)


def test_a_failed_run_warns_for_its_own_vector_table_and_leaves_the_check_of_others(
    materialize: Any, tables: Any, engine: Engine, instance: dg.DagsterInstance
) -> None:
    sound, failing = tables.create("sound"), tables.create("failing")
    materialize(sound)
    engine.fails = EmbeddingRejected("Wrong key.")
    result = materialize(failing, tables.task(failing))
    (evaluation,) = result.get_asset_check_evaluations()
    assert (evaluation.partition, evaluation.passed) == (tables.partition(failing), False)
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    assert "Wrong key." in evaluation.description
    statuses = {
        info.partition_key: info.latest_execution_status
        for info in instance.event_log_storage.get_asset_check_partition_info(
            [dg.AssetCheckKey(assets.vector_table.key, CHECK_NAME)]
        )
    }
    assert {key: status.value for key, status in statuses.items()} == {
        tables.partition(sound): "FAILED",  # by its failed row
        tables.partition(failing): "FAILED",
    }, "none is left as planned: that would be shown as an execution that failed"


def test_a_failure_shows_its_message_without_a_stack_of_dagsters_functions(
    materialize: Any, tables: Any, engine: Engine
) -> None:
    engine.fails = EmbeddingRejected("Wrong key.", resolution="Give another key.")
    result = materialize(tables.create("t"))
    error = failure(result).step_failure_data.error
    assert (error.message, error.stack, error.cause, error.context) == (
        "Wrong key.\nGive another key.", [], None, None,
    )  # fmt: skip
    (ended,) = [event for event in result.all_events if event.event_type_value == "PIPELINE_FAILURE"]
    shown = ended.job_failure_data.first_step_failure_event.step_failure_data.error.to_string()
    assert shown == "Wrong key.\nGive another key."


def test_a_materialization_of_the_ui_makes_its_own_task(
    materialize: Any, tables: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("t")
    for task_type, mode in (("backfill", RunMode.backfill), ("rebackfill", RunMode.backfill), ("sync", RunMode.sync)):
        result = materialize(key, mode=mode)
        assert result.success
        task = tables.get_task(instance.get_run_by_id(result.run_id).tags[TASK_TAG])
        assert (task.task_type, task.status, task.dagster_run_id) == (task_type, "completed", result.run_id)


def test_options_of_the_ui_reach_the_task(materialize: Any, tables: Any, instance: dg.DagsterInstance) -> None:
    result = materialize(tables.create("t", live=True), mode=RunMode.sync, confirm_mass_delete=True)
    task = tables.get_task(instance.get_run_by_id(result.run_id).tags[TASK_TAG])
    assert task.options == {"confirm_mass_delete": True}


def test_a_sync_that_changed_nothing_keeps_the_data_version(materialize: Any, tables: Any, engine: Engine) -> None:
    key = tables.create("t")
    versions = []
    materialize(key)
    for embedded in (0, 3, 0):
        engine.embedded = embedded
        (made,) = materializations(materialize(key, mode=RunMode.sync))
        versions.append(made.tags["dagster/data_version"])
    assert versions[0] == "v1"
    assert versions[1].startswith("v1+task_")
    assert versions[2] == versions[1]


def test_refused_while_a_task_is_live(materialize: Any, tables: Any) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    result = materialize(key)
    assert not result.success
    assert "is queued or running" in failure(result).step_failure_data.user_failure_data.description
    assert tables.get_task(task_id).status == "pending"
    assert tables[key].sync_status == "backfilling"


@pytest.mark.parametrize("kind", ["unknown", "deleted", "never built"])
def test_refused_where_it_makes_no_sense(materialize: Any, tables: Any, kind: str) -> None:
    key = "vt_unknown" if kind == "unknown" else tables.create("t")
    if kind == "deleted":
        tables.delete(key)
    result = materialize(key, mode=RunMode.sync)
    data = failure(result).step_failure_data.user_failure_data
    assert data.metadata["code"].value == (
        "vector_table_not_ready" if kind == "never built" else "vector_table_not_found"
    )
    assert kind == "unknown" or tables.live_task(key) is None


def test_a_superseded_run_neither_fails_nor_materializes(
    materialize: Any, tables: Any, instance: dg.DagsterInstance
) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    tables.claim(task_id, "another")
    result = materialize(key, task_id)
    assert result.success
    assert not materializations(result)
    assert not result.get_asset_check_evaluations()
    assert instance.get_run_by_id(result.run_id).tags[OUTCOME_TAG] == "superseded"
    assert tables.get_task(task_id).status == "running"


def test_re_executing_a_run_whose_task_has_ended_makes_a_new_task(
    runtime: Runtime, tables: Any, instance: dg.DagsterInstance, make_run: Callable[..., str]
) -> None:
    key = tables.create("t")
    ended = tables.task(key)
    tables.change_task(ended, status="failed", ended_at=now())
    run = instance.get_run_by_id(make_run(dg.DagsterRunStatus.STARTED, key, ended))

    def chosen(parent_run_id: str | None) -> str:
        again = SimpleNamespace(run_id=run.run_id, tags=run.tags, parent_run_id=parent_run_id)
        context = SimpleNamespace(run=again, partition_key=key, instance=instance)
        return assets.find_or_create_task(runtime, context, VectorTableConfig())

    assert chosen(None) == ended  # a duplicate launch: it will be superseded
    task_id = chosen("parent")
    assert task_id != ended
    assert instance.get_run_by_id(run.run_id).tags[TASK_TAG] == task_id


@pytest.mark.parametrize(
    ("error", "status"), [(SourceUnavailable("It is down."), "pending"), (EmbeddingRejected("Wrong key."), "failed")]
)
def test_errors_are_told_with_what_to_do(
    materialize: Any, tables: Any, engine: Engine, error: Exception, status: str
) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    engine.fails = error
    result = materialize(key, task_id)
    data = failure(result).step_failure_data
    assert data.user_failure_data.description == str(error)
    assert data.user_failure_data.metadata["resolution"].value
    assert tables.get_task(task_id).status == status


def test_a_bug_tells_where_but_not_what(
    materialize: Any, tables: Any, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.fails = ValueError("row 7: Jane Doe, jane@example.org")
    result = materialize(tables.create("t"))
    event = failure(result)
    assert "ValueError" in event.step_failure_data.user_failure_data.description
    assert "in __call__" in event.step_failure_data.user_failure_data.metadata["where"].value
    assert "Jane" not in str(event)
    out, err = capfd.readouterr()
    assert "Jane" not in out + err


def test_a_run_terminated_in_the_ui_is_cancelled_and_so_is_its_task(
    materialize: Any, tables: Any, engine: Engine, instance: dg.DagsterInstance
) -> None:
    key = tables.create("t", live=True)
    task_id = tables.task(key)

    def terminate() -> None:
        run_id = tables.get_task(task_id).dagster_run_id
        instance.report_run_canceling(instance.get_run_by_id(run_id))
        os.kill(os.getpid(), signal.SIGTERM)

    engine.during = terminate
    assert not materialize(key, task_id).success
    (run,) = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert tables.get_task(task_id).status == "cancelled"
    assert tables[key].sync_status == "synced"


def test_a_run_cancelled_by_the_api_is_cancelled_in_dagster(
    materialize: Any, tables: Any, engine: Engine, instance: dg.DagsterInstance
) -> None:
    engine.fails = RunCancelled("The task was cancelled.")
    assert not materialize(tables.create("t")).success
    (run,) = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.CANCELED


def test_a_process_that_is_told_to_stop_leaves_its_task_to_the_next(
    materialize: Any, tables: Any, engine: Engine, instance: dg.DagsterInstance
) -> None:
    key = tables.create("t")
    task_id = tables.task(key)
    engine.during = lambda: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    result = materialize(key, task_id)
    assert not result.success
    assert tables.get_task(task_id).status == "pending"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_is_not_held_back(materialize: Any, tables: Any, engine: Engine) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    engine.during = twice
    assert not materialize(tables.create("t")).success


def test_checks_that_cannot_look_do_not_fail_the_run(
    materialize: Any, tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise SourceUnavailable("It is down.")

    monkeypatch.setattr(checks, "inspect_live_set", down)
    result = materialize(tables.create("t"))
    assert result.success
    assert {check.passed for check in result.get_asset_check_evaluations()} == {False}
    assert {check.severity for check in result.get_asset_check_evaluations()} == {dg.AssetCheckSeverity.WARN}


@pytest.mark.parametrize(
    ("inspection", "severity", "finding"),
    [
        (LiveSetInspection(10, 10, 0, 0, 10, 0, 0), None, "Every row"),
        (LiveSetInspection(0, 0, 0, 0, 0, 0, 0), None, "Every row"),
        (LiveSetInspection(10, 7, 3, 0, 7, 0, 0), None, "Every row"),
        (LiveSetInspection(11, 10, 0, 0, 10, 0, 0), "WARN", "There are 10 points for 11 rows"),
        (LiveSetInspection(10, 9, 0, 1, 9, 0, 0), "WARN", "1 rows were refused"),
        (LiveSetInspection(10, 10, 0, 0, 10, 0, 2), "WARN", "2 of 10 sampled points were made from rows"),
        (LiveSetInspection(10, 10, 0, 0, 10, 1, 0), "ERROR", "1 of 10 sampled vectors have other dimensions"),
    ],
)
def test_the_verdict_says_what_was_found(inspection: LiveSetInspection, severity: str | None, finding: str) -> None:
    verdict = judge(inspection)
    assert verdict.passed == (severity is None)
    assert severity in (None, verdict.severity.value)
    assert verdict.description.startswith(finding)
