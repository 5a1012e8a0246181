"""What Prometheus reads: requests, queries, providers, and the state of the catalog; no ids, no names, no secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import URL

from api.metrics import Metrics
from embedd_dagster.catalog.database import Catalog
from tests.api.tenants import Tenant
from tests.api.test_query import Built
from tests.support.openai_server import RunningServer, running_openai_server

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(client: TestClient) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return _samples(response.text)


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


def test_requests_are_counted_by_template(app_with: Callable[..., TestClient], catalog: Catalog, source: URL) -> None:
    tenant = Tenant.create(app_with(), catalog, source)
    tenant.get(f"/v1/vector-tables/vt_{'0' * 26}")
    tenant.get(f"/v1/vector-tables/vt_{'1' * 26}")
    tenant.get("/nothing/at-all")
    tenant.send("BREW", "/v1/tasks")
    samples = _scrape(tenant.client)
    route = "/v1/vector-tables/{vector_table_id}"
    assert _value(samples, "embedd_http_requests_total", method="GET", route=route, status="404") == 2
    assert _value(samples, "embedd_http_requests_total", method="GET", route="unmatched", status="404") == 1
    assert _value(samples, "embedd_http_request_duration_seconds_count", method="GET", route=route) == 2
    assert not any("BREW" in str(labels) for _name, labels in samples)
    assert not any("0" * 26 in str(labels) for _name, labels in samples)


def test_queries_providers_and_the_catalog_are_measured(
    app_with: Callable[..., TestClient], catalog: Catalog, source: URL, server: RunningServer, qdrant_url: str
) -> None:
    tenant = Tenant.create(app_with(qdrant_url=qdrant_url), catalog, source)
    built = Built(tenant, server)
    assert built.query(query="x" * 400).status_code == 200
    server.behave(api_key="another")
    assert built.query(query="x").status_code == 502
    tenant.post(f"{built.path}/sync")
    samples = _scrape(tenant.client)
    for stage, number in {"catalog": 2, "embed": 2, "search": 1, "total": 2}.items():
        assert _value(samples, "embedd_query_stage_duration_seconds_count", stage=stage) == number
    assert _value(samples, "embedd_provider_calls_total", provider="openai", outcome="ok") == 1
    assert _value(samples, "embedd_provider_calls_total", provider="openai", outcome="embedding_failed") == 1
    assert _value(samples, "embedd_provider_tokens_total", provider="openai") == 100
    # the catalog is shared with other tests: at least what this one has made
    assert _value(samples, "embedd_catalog_up") == 1
    assert _value(samples, "embedd_vector_tables", sync_status="synced") >= 1
    assert _value(samples, "embedd_tasks_live", task_type="sync", status="pending") >= 1
    assert _value(samples, "embedd_sync_staleness_seconds", quantile="0.5") >= 0
    assert _value(samples, "embedd_sync_staleness_seconds", quantile="1") < 3600
    ended = {"task_type": "backfill", "status": "completed"}
    assert _value(samples, "embedd_tasks_ended", **ended) >= 1
    assert _value(samples, "embedd_tasks_ended_rows", **ended, outcome="processed") >= 30
    assert _value(samples, "embedd_tasks_ended_tokens", **ended) > 0
    told = tenant.client.get("/metrics").text
    for secret in (built.id, tenant.org_id, tenant.environment_id, tenant.key, "products"):
        assert secret not in told


def test_the_catalog_is_not_asked_at_every_scrape(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    from embedd_dagster.catalog import statistics

    read = statistics.read
    monkeypatch.setattr(statistics, "read", lambda session: asked.append(session) or read(session))
    metrics = Metrics(catalog)
    metrics.text()
    metrics.text()
    assert len(asked) == 1


def test_a_catalog_that_is_down_is_told(app_with: Callable[..., TestClient]) -> None:
    client = app_with(database_url=SecretStr("postgresql://nobody@127.0.0.1:1/nothing"))
    client.get("/health")
    samples = _scrape(client)
    assert _value(samples, "embedd_catalog_up") == 0
    assert not any(name == "embedd_vector_tables" for name, _labels in samples)
    assert _value(samples, "embedd_http_requests_total", method="GET", route="/health", status="200") == 1
