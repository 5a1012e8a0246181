"""Statuses, counts, tasks and Dagster's runs agree, also after a process was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.support.e2e import API_KEY, COLUMNS, Embedd, worker_of

pytestmark = pytest.mark.e2e

ROWS = 4000
TESTED = 1  # the word that tests a new provider
SLOW_SECONDS = 0.8
OUTAGE_SECONDS = 30
TWO_TICKS_SECONDS = 12


def _assert_settled(embedd: Embedd, vector_table_id: str, rows: int) -> None:
    """Everything that can be seen says the same: synced, complete, nothing live."""
    table = embedd.table(vector_table_id)
    assert (table["sync_status"], table["total_rows"], table["synced_rows"]) == ("synced", rows, rows)
    tasks = embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"]
    assert not [task for task in tasks if task["status"] in {"pending", "running"}]
    status = embedd.get(f"/v1/vector-tables/{vector_table_id}/sync/status")
    assert status["sync_status"] == "synced"
    assert status["last_error"] is None


def _start_slow_backfill(embedd: Embedd, eventually: Callable[..., Any], mode: str = "managed") -> tuple[str, str]:
    """A vector table and its backfill's task, which is in the middle of the rows."""
    embedd.provider_server.behave(latency_seconds=SLOW_SECONDS)
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table(mode)
    task_id = embedd.backfill(vector_table_id)
    eventually(lambda: embedd.task(task_id)["progress"]["rows_processed"] > 0)
    return vector_table_id, task_id


def test_a_killed_worker_is_resumed_and_little_is_paid_twice(embedd: Embedd, eventually: Callable[..., Any]) -> None:
    vector_table_id, task_id = _start_slow_backfill(embedd, eventually)
    run_id = embedd.task(task_id)["dagster_run_id"]
    os.kill(worker_of(run_id).pid, signal.SIGKILL)
    embedd.provider_server.behave(latency_seconds=0)
    task = embedd.wait_for_task(task_id)
    assert task["status"] == "completed"
    assert task["attempts"] == 2
    assert task["dagster_run_id"] != run_id
    assert embedd.run_status(run_id) in {"FAILURE", "CANCELED"}
    eventually(lambda: embedd.run_status(task["dagster_run_id"]) == "SUCCESS")
    _assert_settled(embedd, vector_table_id, ROWS)
    stats = embedd.provider_server.stats()
    in_flight = stats["max_in_flight"] * stats["max_items"]
    assert stats["texts"] <= TESTED + ROWS + in_flight, "more than the batches in flight was embedded again"


def test_a_restart_of_the_code_server_costs_a_backfill_no_attempt(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    """As Ctrl-C or a deployment does it: the run gives its task back, and another goes on where it was."""
    vector_table_id, task_id = _start_slow_backfill(embedd, eventually)
    embedd.stack.stop_child("code-server")
    embedd.stack.start_child("code-server")
    embedd.provider_server.behave(latency_seconds=0)
    task = embedd.wait_for_task(task_id)
    assert (task["status"], task["attempts"]) == ("completed", 1)
    _assert_settled(embedd, vector_table_id, ROWS)
    stats = embedd.provider_server.stats()
    assert stats["texts"] <= TESTED + ROWS + stats["max_in_flight"] * stats["max_items"]


def test_a_run_terminated_in_the_ui_is_a_cancelled_task(embedd: Embedd, eventually: Callable[..., Any]) -> None:
    vector_table_id, task_id = _start_slow_backfill(embedd, eventually)
    run_id = embedd.task(task_id)["dagster_run_id"]
    terminate = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
    assert embedd.graphql(terminate, id=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    task = embedd.wait_for_task(task_id)
    assert task["status"] == "cancelled"
    assert embedd.table(vector_table_id)["sync_status"] == "pending"
    eventually(lambda: embedd.run_status(run_id) == "CANCELED")
    embedd.provider_server.behave(latency_seconds=0)
    embedd.build(vector_table_id)
    _assert_settled(embedd, vector_table_id, ROWS)


def test_a_rebackfill_terminated_in_the_ui_is_not_begun_again_until_asked_for(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    path = f"/v1/vector-tables/{vector_table_id}"
    embedd.provider_server.behave(latency_seconds=SLOW_SECONDS)
    embedd.api.put(path, json={"columns": [{**COLUMNS[0], "name_prefix": "item: "}, *COLUMNS[1:]]})
    (running,) = eventually(lambda: embedd.get(f"/v1/tasks?target_id={vector_table_id}&status=running")["data"])
    terminate = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
    embedd.graphql(terminate, id=running["dagster_run_id"])
    assert embedd.wait_for_task(running["id"])["status"] == "cancelled"
    embedd.provider_server.behave(latency_seconds=0)
    time.sleep(TWO_TICKS_SECONDS)
    assert [task["task_type"] for task in embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"]] == [
        "rebackfill",
        "backfill",
    ]
    assert embedd.table(vector_table_id)["sync_status"] == "pending_rebackfill"
    assert "cancelled" in embedd.get(f"{path}/sync/status")["last_error"]
    embedd.build(vector_table_id)
    _assert_settled(embedd, vector_table_id, ROWS)


def test_a_cancelled_task_ends_its_run(embedd: Embedd, eventually: Callable[..., Any]) -> None:
    vector_table_id, task_id = _start_slow_backfill(embedd, eventually)
    embedd.post(f"/v1/tasks/{task_id}/cancel")
    task = embedd.wait_for_task(task_id)
    assert task["status"] == "cancelled"
    assert embedd.table(vector_table_id)["sync_status"] == "pending"
    eventually(lambda: embedd.run_status(task["dagster_run_id"]) in {"CANCELED", "FAILURE"})


def test_a_provider_that_refuses_the_key_stops_the_table_and_says_so(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    embedd.create_source(10)
    vector_table_id = embedd.create_vector_table()
    embedd.provider_server.behave(api_key="another key")
    task = embedd.wait_for_task(embedd.backfill(vector_table_id))
    assert (task["status"], task["attempts"]) == ("failed", 1)
    table = embedd.table(vector_table_id)
    assert table["sync_status"] == "error"
    status = embedd.get(f"/v1/vector-tables/{vector_table_id}/sync/status")
    assert "key" in status["last_error"]
    assert "another key" not in status["last_error"]
    eventually(lambda: embedd.run_status(task["dagster_run_id"]) == "FAILURE")
    embedd.provider_server.behave(api_key=API_KEY)
    embedd.build(vector_table_id)
    _assert_settled(embedd, vector_table_id, 10)


def test_a_source_table_dropped_in_the_middle_is_an_error_not_an_empty_table(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table()
    embedd.build(vector_table_id)
    embedd.sql("DROP TABLE products")
    task = embedd.wait_for_task(embedd.backfill(vector_table_id))
    assert task["status"] == "failed"
    table = embedd.table(vector_table_id)
    assert table["sync_status"] == "error"
    assert "products" in embedd.get(f"/v1/vector-tables/{vector_table_id}/sync/status")["last_error"]
    assert embedd.query(vector_table_id, "product", limit=1), "the old vectors still answer"


@pytest.mark.parametrize("part", ["qdrant", "postgres"])
def test_a_store_or_the_database_that_is_down_for_a_while_is_waited_for(
    embedd: Embedd, eventually: Callable[..., Any], part: str
) -> None:
    vector_table_id, task_id = _start_slow_backfill(embedd, eventually)
    embedd.provider_server.behave(latency_seconds=0.1)
    embedd.stack.stop_child(part)
    try:
        time.sleep(OUTAGE_SECONDS)
    finally:
        embedd.stack.start_child(part)
    task = embedd.wait_for_task(task_id)
    assert task["status"] == "completed", task
    _assert_settled(embedd, vector_table_id, ROWS)

    def succeeded() -> bool:
        with suppress(httpx.HTTPStatusError):  # the webserver's pooled connections were cut: its first answer is a 500
            return embedd.run_status(task["dagster_run_id"]) == "SUCCESS"
        return False

    eventually(succeeded)


def test_a_backfill_asked_for_while_dagster_is_down_is_done_when_it_is_back(embedd: Embedd) -> None:
    embedd.create_source(50)
    vector_table_id = embedd.create_vector_table()
    embedd.stack.stop_child("dagster-webserver")
    try:
        started = embedd.post(f"/v1/vector-tables/{vector_table_id}/backfill")
        assert started["status"] == "backfilling"
        # the daemon alone is enough: the sensor launches what was not
        assert embedd.wait_for_task(started["task_id"])["status"] == "completed"
    finally:
        embedd.stack.start_child("dagster-webserver")
    _assert_settled(embedd, vector_table_id, 50)


def test_of_two_backfills_at_once_one_is_refused(embedd: Embedd) -> None:
    embedd.create_source(200)
    vector_table_id = embedd.create_vector_table()
    path = f"/v1/vector-tables/{vector_table_id}/backfill"
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _number: embedd.api.post(path), range(8)))
    assert sorted(response.status_code for response in responses) == [200] + [409] * 7
    refused = next(response for response in responses if response.status_code == 409).json()
    assert refused["error"]["code"] == "backfill_in_progress"
    accepted = next(response for response in responses if response.status_code == 200).json()
    assert embedd.wait_for_task(accepted["task_id"])["status"] == "completed"
    _assert_settled(embedd, vector_table_id, 200)


def test_a_materialization_clicked_in_the_ui_is_a_backfill_and_refused_while_one_is_live(
    embedd: Embedd, eventually: Callable[..., Any]
) -> None:
    embedd.provider_server.behave(latency_seconds=SLOW_SECONDS)
    embedd.create_source(ROWS)
    vector_table_id = embedd.create_vector_table()
    first = eventually(lambda: _click_materialize(embedd, vector_table_id))
    task = eventually(lambda: next(iter(embedd.get(f"/v1/tasks?target_id={vector_table_id}")["data"]), None))
    assert (task["task_type"], embedd.table(vector_table_id)["sync_status"]) == ("backfill", "backfilling")
    second = _click_materialize(embedd, vector_table_id)
    embedd.provider_server.behave(latency_seconds=0)
    assert embedd.wait_for_task(task["id"])["status"] == "completed"
    eventually(lambda: embedd.run_status(first) == "SUCCESS")
    # Dagster queues the second behind the first (one run a partition); what it does then is a re-backfill of its own
    eventually(lambda: embedd.run_status(second) in {"SUCCESS", "FAILURE"})
    eventually(lambda: embedd.table(vector_table_id)["sync_status"] == "synced")
    _assert_settled(embedd, vector_table_id, ROWS)


def _click_materialize(embedd: Embedd, vector_table_id: str) -> str | None:
    """What the UI sends when Materialize is clicked on one partition; None while the partition is not there yet."""
    mutation = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
        __typename ... on LaunchRunSuccess { run { runId } } } }"""
    parameters = {
        "mode": "default",
        "executionMetadata": {
            "tags": [{"key": "dagster/partition", "value": embedd.table(vector_table_id)["dagster_partition"]}]
        },
        "runConfigData": "{}",
        "selector": {
            "repositoryLocationName": "embedd",
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [{"path": ["vector_table"]}],
            "assetCheckSelection": [],
        },
    }
    answer = embedd.graphql(mutation, params=parameters)["launchRun"]
    run_id: str | None = answer["run"]["runId"] if answer["__typename"] == "LaunchRunSuccess" else None
    return run_id


def test_the_api_answers_ready_by_name(embedd: Embedd) -> None:
    ready = httpx.get(f"{embedd.stack.endpoints.api}/ready", trust_env=False)
    assert ready.status_code == 200
    assert "qdrant" in ready.text
