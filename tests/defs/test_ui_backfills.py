"""Backfills of several vector tables that somebody launches together in Dagster's UI.

With Dagster's own GraphQL mutation, backfill daemon and queue, in this process. No run is executed: records stand for it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.test_utils import instance_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.backfill import execute_backfill_iteration
from dagster_graphql.schema import create_schema

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.clock import now
from embedd_dagster.core.status import TaskType
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.reconcile.sensor import reconcile
from embedd_dagster.defs.stopping import cancel_was_asked_for
from embedd_dagster.engine.runtime import Runtime

LAUNCH = """mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}"""
CANCEL = """mutation($id: String!) { cancelPartitionBackfill(backfillId: $id) { __typename } }"""


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    overrides = {"run_coordinator": {"module": "dagster", "class": "QueuedRunCoordinator"}}
    with instance_for_test(overrides=overrides) as made:
        yield made


@pytest.fixture
def workspace(instance: dg.DagsterInstance) -> Iterator[WorkspaceProcessContext]:
    target = LoadableTargetOrigin(executable_path=sys.executable, module_name="embedd_dagster.definitions")
    origin = InProcessCodeLocationOrigin(target, location_name="embedd")
    with WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)) as made:
        yield made


class Dagster:
    """The UI, the backfill daemon and the reconcile sensor, each a step at a time."""

    def __init__(
        self, instance: dg.DagsterInstance, runtime: Runtime, workspace: WorkspaceProcessContext, tables: Any
    ) -> None:
        self.instance, self.runtime, self._workspace, self._tables = instance, runtime, workspace, tables
        self._schema, self._memory = create_schema(), Memory()

    def _execute(self, query: str, **variables: Any) -> Any:
        context = self._workspace.create_request_context()
        result = self._schema.execute(query, context_value=context, variable_values=variables)
        assert not result.errors, result.errors
        return next(iter(result.data.values()))

    def launch(self, table_ids: list[str], *, by_job: bool = False, mode: str = "backfill") -> str:
        """Materializes these vector tables together: from the asset's page, or from the job's."""
        return self.launch_keys([*map(self._tables.partition, table_ids)], by_job=by_job, mode=mode)

    def launch_keys(self, keys: list[str], *, by_job: bool = False, mode: str = "backfill") -> str:
        """Materializes the partitions of these keys together."""
        repository = {"repositoryLocationName": "embedd", "repositoryName": "__repository__"}
        what: dict[str, Any] = {"assetSelection": [{"path": ["vector_table"]}]}
        if by_job:
            what = {
                "selector": {
                    "partitionSetName": "vector_table_job_partition_set",
                    "repositorySelector": repository,
                }
            }
        config = {"ops": {"vector_table": {"config": {"mode": mode}}}}
        answer = self._execute(LAUNCH, params={**what, "partitionNames": keys, "runConfigData": config})
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        return str(answer["backfillId"])

    def cancel(self, backfill_id: str) -> None:
        self._execute(CANCEL, id=backfill_id)

    def iterate(self, times: int = 1) -> None:
        """What the backfill daemon does."""
        for _ in range(times):
            list(execute_backfill_iteration(self._workspace, logging.getLogger("test")))

    def tick(self) -> list[dg.RunRequest]:
        result = reconcile(self.instance, lambda: self.runtime, self._memory, print)
        if isinstance(result, dg.SkipReason):
            return []
        for change in result.dynamic_partitions_requests or ():
            if isinstance(change, dg.AddDynamicPartitionsRequest):
                self.instance.add_dynamic_partitions("vector_tables", change.partition_keys)
            else:
                for key in change.partition_keys:
                    self.instance.delete_dynamic_partition("vector_tables", key)
        return list(result.run_requests or ())

    def partitions(self) -> set[str]:
        return set(self.instance.get_dynamic_partitions("vector_tables"))

    def asked_for(self, requests: list[dg.RunRequest]) -> set[str]:
        """The vector tables that these runs are for."""
        return {self._tables.of(str(request.partition_key)) for request in requests}

    def status(self, backfill_id: str) -> BulkActionStatus:
        backfill = self.instance.get_backfill(backfill_id)
        assert backfill is not None
        return backfill.status

    def run_of(self, table_id: str) -> dg.DagsterRun:
        tags = {"dagster/partition": self._tables.partition(table_id)}
        (run,) = self.instance.get_runs(dg.RunsFilter(tags=tags))
        return run

    def begin(self, run: dg.DagsterRun) -> str:
        """What a run from the UI does first: it makes its task, and claims it."""
        self.instance.report_dagster_event(_event("PIPELINE_STARTING", run), run_id=run.run_id)
        self.instance.report_dagster_event(_event("PIPELINE_START", run), run_id=run.run_id)
        table_id = self._tables.of(run.tags["dagster/partition"])
        task_id = str(self._tables.task(table_id, TaskType.BACKFILL, created_at=now()))
        self.instance.add_run_tags(run.run_id, {"embedd/task_id": task_id})
        self._tables.claim(task_id, run.run_id)
        return task_id


def _event(kind: str, run: dg.DagsterRun) -> dg.DagsterEvent:
    return dg.DagsterEvent(event_type_value=kind, job_name=run.job_name)


@pytest.fixture
def dagster(instance: dg.DagsterInstance, runtime: Runtime, workspace: WorkspaceProcessContext, tables: Any) -> Dagster:
    return Dagster(instance, runtime, workspace, tables)


@pytest.fixture
def keys(dagster: Dagster, tables: Any) -> list[str]:
    made = [tables.create(name) for name in "abc"]
    dagster.tick()
    return made


@pytest.mark.parametrize("by_job", [False, True])
def test_deleting_a_vector_table_leaves_the_backfill_of_the_others_at_work(
    dagster: Dagster, tables: Any, keys: list[str], by_job: bool
) -> None:
    backfill_id = dagster.launch(keys, by_job=by_job)
    tables.delete(keys[0])
    dagster.tick()
    assert tables.partition(keys[0]) in dagster.partitions(), "its backfill still needs it"
    dagster.iterate(2)
    assert {run.status for run in dagster.instance.get_runs()} == {Status.QUEUED}
    assert dagster.status(backfill_id) is BulkActionStatus.REQUESTED
    for key in keys:  # the run of the deleted one fails by itself: its vector table does not exist
        run = dagster.run_of(key)
        assert run.status is Status.QUEUED
        dagster.instance.report_run_failed(run)
    dagster.iterate(2)
    assert dagster.status(backfill_id) is BulkActionStatus.COMPLETED_FAILED
    dagster.tick()
    assert dagster.partitions() == set(map(tables.partition, keys[1:]))


def test_what_a_given_up_backfill_left_is_done_all_the_same(
    dagster: Dagster, tables: Any, keys: list[str], runtime: Runtime
) -> None:
    backfill_id = dagster.launch(keys)
    dagster.iterate()
    cancelled, at_work, waiting = keys
    dagster.instance.run_coordinator.cancel_run(dagster.run_of(cancelled).run_id)  # by somebody
    dagster.tick()
    running = dagster.begin(dagster.run_of(at_work))
    # as an older release did with the key of a deleted table; an administrator may, too
    dagster.instance.delete_dynamic_partition("vector_tables", tables.partition(cancelled))
    dagster.iterate(2)
    assert dagster.status(backfill_id) is BulkActionStatus.FAILING
    assert dagster.run_of(waiting).status is Status.CANCELED
    run = dagster.run_of(at_work)
    dagster.instance.report_run_canceling(run)
    assert not cancel_was_asked_for(dagster.instance, run.run_id), "its process puts the task back when it hears"
    dagster.instance.report_run_canceled(run)
    requests = dagster.tick()
    assert dagster.asked_for(requests) == {at_work, waiting}
    assert (tables.get_task(running).status, tables.get_task(running).attempts) == ("pending", 0)
    assert (
        tables.live_task(waiting).options["reason"] == f"Dagster gave up backfill {backfill_id}, which was to do this."
    )
    assert tables.live_task(cancelled) is None
    dagster.iterate(2)
    assert dagster.status(backfill_id) is BulkActionStatus.FAILED
    with runtime.catalog.transaction() as session:
        for key in (at_work, waiting):
            tasks.cancel(session, tasks.find_live(session, key))
    assert not dagster.tick(), "that was for somebody to decide"


@pytest.mark.parametrize("mode", ["backfill", "sync"])
def test_a_key_that_is_gone_before_the_first_run_does_not_keep_the_others_from_being_materialized(
    dagster: Dagster, tables: Any, mode: str
) -> None:
    key, new = tables.create("a", live=True), tables.create("b")
    dagster.tick()
    # the UI takes only keys that exist at that moment
    dagster.instance.add_dynamic_partitions("vector_tables", ["gone"])
    backfill_id = dagster.launch([key, new, "gone"], mode=mode)
    dagster.instance.delete_dynamic_partition("vector_tables", "gone")
    dagster.iterate(2)
    assert dagster.status(backfill_id) is BulkActionStatus.FAILED
    assert not dagster.instance.get_runs()
    requests = dagster.tick()
    kinds = {asked: tables.live_task(asked).task_type for asked in dagster.asked_for(requests)}
    # what was never built cannot be synced: the UI's run would have said so
    assert kinds == ({key: "sync"} if mode == "sync" else {key: "rebackfill", new: "backfill"})
    again = {request.run_key for request in dagster.tick()}
    assert again <= {request.run_key for request in requests}, "once"
    assert "gone" not in dagster.partitions()


def test_a_backfill_that_somebody_cancels_is_not_taken_up_again(dagster: Dagster, tables: Any, keys: list[str]) -> None:
    backfill_id = dagster.launch(keys)
    dagster.iterate()
    task_id = dagster.begin(dagster.run_of(keys[0]))
    dagster.cancel(backfill_id)
    dagster.instance.report_run_canceling(dagster.run_of(keys[0]))
    assert cancel_was_asked_for(dagster.instance, dagster.run_of(keys[0]).run_id)
    dagster.instance.report_run_canceled(dagster.run_of(keys[0]))
    dagster.iterate(2)
    assert not dagster.tick()
    assert tables.get_task(task_id).status == "cancelled"
    assert dagster.status(backfill_id) is BulkActionStatus.CANCELED
    assert not dagster.tick()


def test_a_given_up_backfill_of_a_partition_that_was_named_by_an_id_is_done_all_the_same(
    dagster: Dagster, tables: Any
) -> None:
    table_id = tables.create("a")
    # launched before the keys could be read
    dagster.instance.add_dynamic_partitions("vector_tables", [table_id, "gone"])
    backfill_id = dagster.launch_keys([table_id, "gone"])
    dagster.instance.delete_dynamic_partition("vector_tables", "gone")
    assert not dagster.tick()
    assert {table_id, tables.partition(table_id)} <= dagster.partitions(), "its backfill still needs the old one"
    dagster.iterate(2)
    assert dagster.status(backfill_id) is BulkActionStatus.FAILED
    (request,) = dagster.tick()
    assert request.partition_key == tables.partition(table_id)
    assert tables.live_task(table_id).task_type == "backfill"
    assert dagster.partitions() == {tables.partition(table_id)}
