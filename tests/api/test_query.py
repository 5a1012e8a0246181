"""Queries over vectors that the engine has made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import URL

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.engine.run import run_task
from tests.api.tenants import Tenant, code_of
from tests.support.openai_server import RunningServer, running_openai_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


class Built:
    """A vector table with live vectors."""

    def __init__(self, tenant: Tenant, server: RunningServer, mode: str = "managed") -> None:
        self.tenant = tenant
        self.server = server
        credentials = {"base_url": server.base_url}
        provider = tenant.made(
            "/v1/embedding-providers", {"name": "o", "provider": "openai", "credentials": credentials}
        )
        table = tenant.table(
            mode=mode, embedding_provider_id=provider["id"], embedding_model="mine", embedding_dimensions=16
        )
        self.id = table["id"]
        self.path = f"/v1/vector-tables/{self.id}"
        self.run(tenant.post(f"{self.path}/backfill").json()["task_id"])

    def run(self, task_id: str) -> None:
        assert isinstance(self.tenant.client.app, FastAPI)
        runtime = self.tenant.client.app.state.embedd.runtime
        run_task(runtime, task_id, uuid4().hex, log=lambda _text: None, should_stop=lambda: False)

    def query(self, **body: Any) -> Any:
        return self.tenant.post(f"{self.path}/query", body)


@pytest.fixture(params=["managed", "platform"])
def built(
    request: pytest.FixtureRequest,
    tenant: Tenant,
    app_with: Callable[..., TestClient],
    server: RunningServer,
    qdrant_url: str,
) -> Built:
    tenant.client = app_with(qdrant_url=qdrant_url)
    return Built(tenant, server, request.param)


def test_an_answer_is_as_the_contract_says(built: Built) -> None:
    text = "title: product 7\nabout 7"
    response = built.query(query=text, limit=3)
    assert response.status_code == 200, response.text
    body = response.json()
    assert (set(body), body["query"], body["model"], body["total_results"]) == (
        {"results", "query", "model", "total_results"}, text, "mine", 3,
    )  # fmt: skip
    first = body["results"][0]
    assert (first["id"], first["embedded_text"]) == (7, text)
    assert first["similarity_score"] == pytest.approx(1, abs=1e-3)
    assert first["metadata"] == {"category": "c1", "price": 0.7, "in_stock": False}
    scores = [result["similarity_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    key = built.tenant.new_key("read_only")
    assert built.tenant.post(f"{built.path}/query", {"query": "x"}, key=key).json()["total_results"] == 10


def test_filters(built: Built) -> None:
    filters = {"in_stock": True, "$or": [{"category": "c0"}, {"price": {"gt": 2.5}}]}
    found = built.query(query="x", limit=100, filters=filters).json()["results"]
    assert {row["id"] for row in found} == {n for n in range(1, 31) if n % 2 == 0 and (n % 3 == 0 or n > 25)}
    assert built.query(query="title: product 7\nabout 7", min_similarity_score=0.99).json()["total_results"] == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"query": ""}, "query"),
        ({"query": "  \n"}, "query"),
        ({"query": "x" * 8001}, "query"),
        ({"query": 5}, "query"),
        ({}, "query"),
        ({"query": "x", "limit": 0}, "limit"),
        ({"query": "x", "limit": 101}, "limit"),
        ({"query": "x", "limit": "5"}, "limit"),
        ({"query": "x", "min_similarity_score": 1.5}, "min_similarity_score"),
        ({"query": "x", "filters": []}, "filters"),
        ({"query": "x", "filters": {"title": "x"}}, "'title' is not a metadata column"),
        ({"query": "x", "filters": {"price": {"like": 1}}}, "filters.price"),
        ({"query": "x", "filters": {"price": "1"}}, "filters.price"),
        ({"query": "x", "filters": {"$or": []}}, "filters.$or"),
        ({"query": "x", "top_k": 5}, "top_k"),
    ],
)
def test_bad_queries(shared: Built, body: dict[str, Any], says: str) -> None:
    response = shared.tenant.post(f"{shared.path}/query", body)
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert says in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def shared(settings: Any, catalog: Catalog, source: URL, server: RunningServer, qdrant_url: str) -> Iterator[Built]:
    from api.app import create_app

    with TestClient(create_app(settings.model_copy(update={"qdrant_url": qdrant_url}))) as client:
        yield Built(Tenant.create(client, catalog, source), server)


def test_a_provider_that_fails_is_a_502(shared: Built) -> None:
    shared.server.behave(api_key="another")
    try:
        response = shared.query(query="x")
        assert (response.status_code, code_of(response)) == (502, "embedding_failed")
    finally:
        shared.server.behave(api_key=None)


def test_a_store_that_is_down_is_a_503(shared: Built, app_with: Callable[..., TestClient], settings: Any) -> None:
    shared_client = shared.tenant.client
    shared.tenant.client = app_with(qdrant_url="http://127.0.0.1:1")
    try:
        response = shared.query(query="x")
    finally:
        shared.tenant.client = shared_client
    assert (response.status_code, code_of(response)) == (503, "vector_store_unavailable")
    assert "retry-after" in response.headers


def test_changes_of_a_live_table(built: Built) -> None:
    tenant, path = built.tenant, built.path
    table = tenant.get(path).json()
    assert (table["sync_status"], table["total_rows"], table["synced_rows"]) == ("synced", 30, 30)
    same = {"columns": table["columns"], "embedding_dimensions": 16, "embedding_model": "mine", "name": table["name"]}
    assert tenant.put(path, same).json()["sync_status"] == "synced"
    title, description, *metadata = table["columns"]
    respelled = {"columns": [*reversed(metadata), {**description, "ordinal": 7, "name_prefix": ""}, title]}
    kept = tenant.put(path, respelled).json()
    assert [column["name"] for column in kept["columns"]] == [column["name"] for column in respelled["columns"]]
    assert kept["sync_status"] == "synced", "it means the same"
    changed = tenant.put(path, {"columns": table["columns"][:1]}).json()
    assert changed["sync_status"] == "pending_rebackfill"
    # the live vectors answer by their own configuration
    assert built.query(query="x", filters={"price": {"gt": 0}}).json()["total_results"] == 10
    status = tenant.get(f"{path}/sync/status").json()
    assert (status["rows_pending"], status["last_error"]) == (30, None)
    assert status["staleness_secs"] >= 0


def test_sync_now(built: Built) -> None:
    started = built.tenant.post(f"{built.path}/sync", {"full": True}).json()
    assert set(started) == {"vector_table_id", "status", "task_id"}
    assert code_of(built.tenant.post(f"{built.path}/sync")) == "backfill_in_progress"
    assert code_of(built.tenant.post(f"{built.path}/backfill")) == "backfill_in_progress"
    built.run(started["task_id"])
    task = built.tenant.get(f"/v1/tasks/{started['task_id']}").json()
    assert (task["task_type"], task["status"]) == ("sync", "completed")
    assert code_of(built.tenant.post(f"{built.path}/sync", {"fulll": True})) == "validation_error"


def test_failed_rows_are_listed_and_tried_again(shared: Built) -> None:
    tenant = shared.tenant
    from tests.support.openai_server import POISON

    with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("CREATE TABLE poisoned AS SELECT * FROM products")
        connection.execute("ALTER TABLE poisoned ADD PRIMARY KEY (id)")
        connection.execute("INSERT INTO poisoned SELECT n, 'more ' || n FROM generate_series(31, 100) n")
        connection.execute("UPDATE poisoned SET title = %s WHERE id IN (3, 4, 5)", [POISON])
    provider_id = tenant.get(shared.path).json()["embedding_provider_id"]
    table = tenant.table(
        source_table="poisoned", embedding_provider_id=provider_id, embedding_model="mine", embedding_dimensions=16
    )
    path = f"/v1/vector-tables/{table['id']}"
    shared.run(tenant.post(f"{path}/backfill").json()["task_id"])
    seen: list[dict[str, Any]] = []
    cursor = ""
    while True:
        body = tenant.get(f"{path}/failed-rows?limit=2{cursor}").json()
        seen += body["data"]
        if not body["pagination"]["has_more"]:
            break
        cursor = f"&cursor={body['pagination']['next_cursor']}"
    assert sorted(row["key"] for row in seen) == [3, 4, 5]
    assert {row["error_code"] for row in seen} == {"embedding_failed"}
    assert POISON not in tenant.get(f"{path}/failed-rows").text
    with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("UPDATE poisoned SET title = 'good' WHERE id = 3")
    retried = tenant.post(f"{path}/failed-rows/retry").json()
    assert retried["failed_rows"] == 3
    shared.run(retried["task_id"])
    left = tenant.get(f"{path}/failed-rows").json()["data"]
    assert sorted(row["key"] for row in left) == [4, 5]
