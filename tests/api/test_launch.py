"""The nudge to Dagster: sent behind the answer, and never in its way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.launch import LAUNCH, TERMINATE
from tests.api.tenants import Tenant


class FakeDagster:
    """Takes GraphQL requests as Dagster's webserver does."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Any = {"data": {"launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "run-1"}}}}
        self.status = 200
        self.delay_seconds = 0.0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                time.sleep(fake.delay_seconds)
                content = json.dumps(fake.answer).encode()
                self.send_response(fake.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def dagster() -> Iterator[FakeDagster]:
    fake = FakeDagster()
    thread = threading.Thread(target=fake.server.serve_forever)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def _eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come true")


def test_a_backfill_is_launched_with_its_partition_and_task(
    tenant: Tenant, app_with: Callable[..., TestClient], dagster: FakeDagster
) -> None:
    table = tenant.table()
    tenant.client = app_with(dagster_url=dagster.url)
    task_id = tenant.post(f"/v1/vector-tables/{table['id']}/backfill").json()["task_id"]
    _eventually(lambda: tenant.get(f"/v1/tasks/{task_id}").json()["dagster_run_id"] == "run-1")
    (request,) = dagster.requests
    assert request["query"] == LAUNCH
    assert request["variables"] == {
        "executionParams": {
            "selector": {
                "repositoryLocationName": "embedd",
                "repositoryName": "__repository__",
                "jobName": "vector_table_job",
            },
            "runConfigData": {"ops": {"vector_table": {"config": {"mode": "backfill"}}}},
            "executionMetadata": {
                "tags": [
                    {"key": "dagster/partition", "value": table["dagster_partition"]},
                    {"key": "embedd/task_id", "value": task_id},
                    {"key": "embedd/name", "value": table["name"]},
                    {"key": "embedd/task_type", "value": "backfill"},
                    {"key": "embedd/lane", "value": "large"},
                    {"key": "embedd/large_environment", "value": request_tags(request)["embedd/large_environment"]},
                    {"key": "embedd/large_provider", "value": table["embedding_provider_id"]},
                ]
            },
        }
    }
    # a task that has a run is asked to end, and its run told so
    assert tenant.post(f"/v1/tasks/{task_id}/cancel").json()["status"] == "pending"
    _eventually(lambda: len(dagster.requests) == 2)
    assert dagster.requests[1] == {"query": TERMINATE, "variables": {"runId": "run-1"}}
    assert tenant.delete(f"/v1/vector-tables/{table['id']}").status_code == 204
    _eventually(lambda: len(dagster.requests) == 3)


def request_tags(request: dict[str, Any]) -> dict[str, str]:
    tags = request["variables"]["executionParams"]["executionMetadata"]["tags"]
    return {tag["key"]: tag["value"] for tag in tags}


def test_an_environment_with_many_tasks_that_wait_does_not_fill_dagsters_queue(
    tenant: Tenant, app_with: Callable[..., TestClient], dagster: FakeDagster
) -> None:
    made = [tenant.table() for _ in range(7)]
    tenant.client = app_with(dagster_url=dagster.url)
    for table in made:
        before = len(dagster.requests)
        answer = tenant.post(f"/v1/vector-tables/{table['id']}/backfill")
        assert answer.status_code == 200, answer.text
        if before < 4:
            _eventually(lambda before=before: len(dagster.requests) == before + 1)
    waiting = [task for task in tenant.get("/v1/tasks").json()["data"] if task["status"] == "pending"]
    assert len(waiting) == 7
    # the launches are made one after the other: once a later one is sent, the others were decided
    assert tenant.post(f"/v1/tasks/{waiting[-1]['id']}/cancel").status_code == 200
    _eventually(lambda: any(request["query"] == TERMINATE for request in dagster.requests))
    assert sum(request["query"] == LAUNCH for request in dagster.requests) == 4


@pytest.mark.parametrize("fault", ["down", "hangs", "500", "refuses", "nonsense"])
def test_whatever_ails_dagster_the_answer_is_quick_and_good(
    tenant: Tenant, app_with: Callable[..., TestClient], dagster: FakeDagster, fault: str
) -> None:
    table = tenant.table()
    url = dagster.url
    if fault == "down":
        url = "http://127.0.0.1:1"
    elif fault == "hangs":
        dagster.delay_seconds = 1.0
    elif fault == "500":
        dagster.status = 500
    elif fault == "refuses":
        dagster.answer = {"data": {"launchRun": {"__typename": "PipelineNotFoundError"}}}
    else:
        dagster.answer = [1]
    tenant.client = app_with(dagster_url=url)
    tenant.get("/v1/tasks")
    begun = time.perf_counter()
    response = tenant.post(f"/v1/vector-tables/{table['id']}/backfill")
    assert response.status_code == 200
    assert time.perf_counter() - begun < 0.5
    assert tenant.get(f"/v1/tasks/{response.json()['task_id']}").json()["dagster_run_id"] is None


def test_the_mutations_are_valid_in_dagsters_own_schema() -> None:
    from dagster_graphql.schema import create_schema
    from graphql import parse, validate

    schema = create_schema().graphql_schema
    for mutation in (LAUNCH, TERMINATE):
        assert validate(schema, parse(mutation)) == []
