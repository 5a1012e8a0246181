"""Nothing that hangs holds a request: a listener that takes connections and never answers, in every place."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from tests.api.tenants import Tenant, code_of, unique
from tests.api.test_query import Built
from tests.support.openai_server import RunningServer, running_openai_server

_PATIENCE = 1.0


@dataclass
class Hung:
    """Where nobody answers."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def hung() -> Iterator[Hung]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield Hung(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@pytest.fixture(params=["managed", "platform"])
def built(
    request: pytest.FixtureRequest,
    tenant: Tenant,
    app_with: Callable[..., TestClient],
    server: RunningServer,
    qdrant_url: str,
) -> Built:
    tenant.client = app_with(qdrant_url=qdrant_url, request_timeout_seconds=_PATIENCE)
    return Built(tenant, server, request.param)


def _unavailable(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, code_of(response)) == (status, code), response.text
    assert int(response.headers["retry-after"]) >= 1


def test_a_hung_source(built: Built, hung: Hung) -> None:
    tenant = built.tenant
    connection_id = tenant.get(built.path).json()["connection_id"]
    body = {"credentials": {**tenant.credentials, "port": hung.port}}
    with _within(8):
        changed = tenant.put(f"/v1/connections/{connection_id}", body).json()
    assert changed["status"] == "failed"
    assert changed["last_error"]
    for path in (f"/v1/connections/{connection_id}/tables", f"{built.path}/schema"):
        with _within(5):
            _unavailable(tenant.get(path), 503, "source_unavailable")
    # what only asks for an estimate goes on without
    with _within(5):
        assert tenant.post(f"{built.path}/backfill").status_code == 200


def test_hung_sources_leave_threads_to_others(tenant: Tenant, hung: Hung, app_with: Callable[..., TestClient]) -> None:
    """As many tests of connections as may be, and some more; all other requests are answered at once."""
    tenant.client = app_with(request_timeout_seconds=3.0)
    connection_id = tenant.connection()["id"]
    tenant.put(f"/v1/connections/{connection_id}", {"credentials": {**tenant.credentials, "port": hung.port}})
    asked = tenant.state.external_calls.at_most + 8
    with ThreadPoolExecutor(asked) as clients:
        answers = [clients.submit(tenant.post, f"/v1/connections/{connection_id}/test") for _ in range(asked)]
        refused = [answer.result() for answer in islice(as_completed(answers), 8)]
        for one in refused:
            _unavailable(one, 503, "server_busy")
        with _within(2):
            assert tenant.get("/v1/connections").status_code == 200
        assert sum(answer.done() for answer in answers) == 8, "all of this was answered while the slow ones waited"
    assert {answer.result().status_code for answer in answers} == {200, 503}
    assert tenant.post(f"/v1/connections/{connection_id}/test").status_code == 200


def test_a_hung_provider(built: Built, server: RunningServer) -> None:
    server.behave(hang_next=1, hang_seconds=20)
    try:
        with _within(5):
            _unavailable(built.query(query="x"), 502, "embedding_failed")
    finally:
        server.behave(hang_next=0)


def test_a_hung_provider_in_its_test(built: Built, hung: Hung) -> None:
    credentials: dict[str, Any] = {"base_url": f"{hung.url}/v1"}
    body = {"name": unique("p"), "provider": "openai", "credentials": credentials}
    provider = built.tenant.made("/v1/embedding-providers", body)
    with _within(5):
        answer = built.tenant.post(f"/v1/embedding-providers/{provider['id']}/test").json()
    assert answer["status"] == "failed"
    assert "did not answer" in answer["error"]


def test_a_hung_store(built: Built, hung: Hung, app_with: Callable[..., TestClient]) -> None:
    tenant = built.tenant
    table = tenant.get(built.path).json()
    if table["mode"] == "managed":
        tenant.client = app_with(qdrant_url=hung.url, request_timeout_seconds=_PATIENCE)
    else:
        body = {"credentials": {**tenant.credentials, "port": hung.port}}
        tenant.put(f"/v1/connections/{table['connection_id']}", body)
    with _within(6):
        _unavailable(built.query(query="x"), 503, "vector_store_unavailable")


def test_a_hung_catalog(app_with: Callable[..., TestClient], hung: Hung, tenant: Tenant) -> None:
    client = app_with(database_url=SecretStr(f"postgresql://somebody@127.0.0.1:{hung.port}/catalog"))
    with _within(12):
        response = client.get("/v1/environments", headers={"Authorization": f"Bearer {tenant.key}"})
    _unavailable(response, 503, "catalog_unavailable")


def test_a_hung_qdrant_and_dagster_do_not_hang_readiness(app_with: Callable[..., TestClient], hung: Hung) -> None:
    client = app_with(qdrant_url=hung.url, dagster_url=hung.url)
    with _within(8):
        response = client.get("/ready")
    assert response.status_code == 503
    checks = response.json()["checks"]
    assert (checks["catalog"]["status"], checks["qdrant"]["status"], checks["dagster"]["status"]) == (
        "ok",
        "down",
        "down",
    )
