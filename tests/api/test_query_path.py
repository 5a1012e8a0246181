"""What makes queries fast must not make them wrong: one question to the catalog, and every change is seen at once."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import psycopg
import pytest
from fastapi.testclient import TestClient

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.live_tables import LiveTable, find_live
from embedd_dagster.catalog.lookups import Lookups
from embedd_dagster.engine.search import Question
from embedd_dagster.engine.teardown import drop_retired_sets
from tests.api.tenants import Tenant, code_of
from tests.api.test_query import Built
from tests.support.openai_server import RunningServer, running_openai_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


@pytest.fixture(params=["managed", "platform"])
def built(
    request: pytest.FixtureRequest,
    tenant: Tenant,
    app_with: Callable[..., TestClient],
    server: RunningServer,
    qdrant_url: str,
) -> Built:
    server.reset()
    tenant.client = app_with(qdrant_url=qdrant_url, retired_set_grace_seconds=0)
    return Built(tenant, server, request.param)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that a query sends to the catalog from now on; any transaction fails."""
    sent: list[str] = []
    fetch_one = Lookups.fetch_one

    def counting(self: Lookups, statement: str, parameters: Any) -> Any:
        sent.append(statement)
        return fetch_one(self, statement, parameters)

    def refuse(_self: Catalog) -> NoReturn:
        raise AssertionError("a query has begun a transaction in the catalog")

    monkeypatch.setattr(Lookups, "fetch_one", counting)
    monkeypatch.setattr(Catalog, "transaction", refuse)
    return sent


def test_a_query_asks_the_catalog_once(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built.query(query="x").status_code == 200  # opens the store and the embedder
    sent = _count(monkeypatch)
    for body in ({"query": "x"}, {"query": "x", "filters": {"price": {"gt": 0}}, "limit": 100}):
        sent.clear()
        assert built.query(**body).status_code == 200
        assert len(sent) == 1
    sent.clear()
    assert built.query(query="").status_code == 422
    assert built.tenant.post(f"/v1/vector-tables/vt_{'0' * 26}/query", {"query": "x"}).status_code == 404
    assert built.tenant.post(f"{built.path}/query", {"query": "x"}, key="sk_" + "a" * 43).status_code == 401
    assert len(sent) == 3


def test_the_answer_says_where_its_time_went(built: Built) -> None:
    timing = built.query(query="x").headers["server-timing"]
    parts = {name: float(duration) for name, duration in re.findall(r"(\w+);dur=([\d.]+)", timing)}
    assert set(parts) == {"catalog", "embed", "search", "total"}
    assert parts["total"] >= parts["catalog"] + parts["embed"] + parts["search"]


def test_a_revoked_key_a_renamed_environment_and_a_deleted_table_are_seen_at_once(built: Built) -> None:
    tenant = built.tenant
    made = tenant.made("/v1/api-keys", {"name": "short-lived"})
    path = f"{built.path}/query"
    assert tenant.post(path, {"query": "x"}, key=made["key"]).status_code == 200
    tenant.delete(f"/v1/api-keys/{made['api_key']['id']}")
    response = tenant.post(path, {"query": "x"}, key=made["key"])
    assert (response.status_code, code_of(response)) == (401, "key_revoked")
    assert response.headers["www-authenticate"] == "Bearer"
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    assert code_of(tenant.post(path, {"query": "x"}, environment=staging)) == "vector_table_not_found"
    tenant.delete(f"/v1/environments/{staging}")
    assert code_of(tenant.post(path, {"query": "x"}, environment=staging)) == "environment_not_found"
    assert code_of(tenant.post(path, {"query": "x"}, environment="nowhere")) == "environment_not_found"
    assert tenant.delete(built.path).status_code == 204
    response = built.query(query="x")
    assert (response.status_code, code_of(response)) == (404, "vector_table_not_found")


def _rebuild(built: Built) -> None:
    columns = built.tenant.get(built.path).json()["columns"]
    assert built.tenant.put(built.path, {"columns": columns[:1]}).json()["sync_status"] == "pending_rebackfill"
    built.run(built.tenant.post(f"{built.path}/backfill").json()["task_id"])


def test_the_first_query_after_a_swap_goes_to_the_new_set(built: Built) -> None:
    assert "\n" in built.query(query="x").json()["results"][0]["embedded_text"]
    _rebuild(built)
    assert drop_retired_sets(built.tenant.state.runtime) > 0
    results = built.query(query="x").json()["results"]
    assert len(results) == 10
    assert not any("\n" in row["embedded_text"] for row in results)


def test_a_swap_between_the_catalogs_answer_and_the_stores(built: Built) -> None:
    state = built.tenant.state

    def find() -> LiveTable:
        found = find_live(state.runtime.catalog, built.tenant.environment_id, built.id)
        assert found is not None
        return found

    seen_before = find()
    _rebuild(built)
    assert drop_retired_sets(state.runtime) > 0
    answer = state.searcher.search(seen_before, Question("x", 10), refresh=find)
    assert len(answer.hits) == 10


def test_connections_that_were_lost_are_replaced(built: Built, catalog_url: str) -> None:
    assert built.query(query="x").status_code == 200
    for url in (catalog_url, built.tenant.source.render_as_string(hide_password=False)):
        with psycopg.connect(url, autocommit=True) as connection:
            killed = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'embedd%'"
            ).fetchone()
            assert killed is not None
            assert killed[0] > 0 or url != catalog_url
    for _ in range(3):
        assert built.query(query="x").status_code == 200


def test_slow_queries_hold_up_nobody_else(built: Built, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = built.tenant
    assert built.query(query="x").status_code == 200
    threads = int(tenant.state.query_threads.total_tokens)
    monkeypatch.setattr(tenant.state.queries, "at_most", threads + 20)
    server.behave(hang_next=1000, hang_seconds=4)
    asked = threads + 20 + 16
    try:
        with ThreadPoolExecutor(asked) as clients:
            answers = [clients.submit(built.query, query=f"slow {n}") for n in range(asked)]
            _until(lambda: server.stats()["in_flight"] == threads)
            for path in ("/health", "/v1/vector-tables", built.path, "/metrics"):
                assert tenant.get(path).status_code == 200
            # all of this was answered while not one of the slow ones was
            assert server.stats()["in_flight"] == threads
            _until(lambda: sum(answer.done() for answer in answers) >= 16)
            refused = [answer.result() for answer in answers if answer.done()]
            assert {(one.status_code, code_of(one)) for one in refused} == {(503, "too_many_queries")}
            assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
            server.behave(hang_next=0)
            assert sorted({answer.result().status_code for answer in answers}) == [200, 503]
    finally:
        server.behave(hang_next=0)


def _until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        waiting.wait(0.02)


def test_queries_count_against_a_providers_limits(built: Built, catalog_url: str) -> None:
    provider_id = built.tenant.get(built.path).json()["embedding_provider_id"]
    limits = {"requests_per_minute": 6000, "tokens_per_minute": 600_000}
    assert built.tenant.put(f"/v1/embedding-providers/{provider_id}", {"limits": limits}).status_code == 200
    for _ in range(3):
        assert built.query(query="x" * 400).status_code == 200
    built.tenant.state.searcher.close()  # books what is left
    with psycopg.connect(catalog_url) as connection:
        booked = connection.execute(
            "SELECT kind, level FROM provider_budgets WHERE embedding_provider_id = %s", [provider_id]
        ).fetchall()
    levels = dict(booked)
    assert set(levels) == {"requests", "tokens"}
    assert 0 < levels["requests"] <= 3
    assert 0 < levels["tokens"] <= 300
