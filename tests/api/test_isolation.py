"""Another organization and another environment: for every operation a 404, and nothing is changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.tenants import COLUMNS, Tenant, code_of, unique

# every operation with an id in its path, with a body that would be accepted
OPERATIONS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/environments/{environment_id}", None),
    ("DELETE", "/v1/environments/{environment_id}", None),
    ("DELETE", "/v1/api-keys/{api_key_id}", None),
    ("GET", "/v1/connections/{connection_id}", None),
    ("PUT", "/v1/connections/{connection_id}", {"name": "stolen"}),
    ("DELETE", "/v1/connections/{connection_id}", None),
    ("POST", "/v1/connections/{connection_id}/test", None),
    ("GET", "/v1/connections/{connection_id}/tables", None),
    ("GET", "/v1/embedding-providers/{embedding_provider_id}", None),
    ("PUT", "/v1/embedding-providers/{embedding_provider_id}", {"name": "stolen"}),
    ("DELETE", "/v1/embedding-providers/{embedding_provider_id}", None),
    ("POST", "/v1/embedding-providers/{embedding_provider_id}/test", None),
    ("GET", "/v1/vector-tables/{vector_table_id}", None),
    ("PUT", "/v1/vector-tables/{vector_table_id}", {"name": "stolen", "columns": COLUMNS[:1]}),
    ("DELETE", "/v1/vector-tables/{vector_table_id}", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/backfill", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/estimate", None),
    ("GET", "/v1/vector-tables/{vector_table_id}/schema", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/query", {"query": "x"}),
    ("GET", "/v1/vector-tables/{vector_table_id}/sync/status", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/sync/pause", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/sync/resume", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/sync", None),
    ("GET", "/v1/vector-tables/{vector_table_id}/failed-rows", None),
    ("POST", "/v1/vector-tables/{vector_table_id}/failed-rows/retry", None),
    ("GET", "/v1/tasks/{task_id}", None),
    ("POST", "/v1/tasks/{task_id}/cancel", None),
]
OF_THE_ORGANIZATION = ("environments", "api-keys")
LISTS = ("environments", "api-keys", "connections", "embedding-providers", "vector-tables", "tasks")


def test_every_operation_with_an_id_is_tried(client: TestClient) -> None:
    documented = {
        (method.upper(), path)
        for path, methods in client.app.openapi()["paths"].items()  # type: ignore[attr-defined]
        for method in methods
        if "{" in path
    }
    assert documented == {(method, path) for method, path, _body in OPERATIONS}


@dataclass
class Owned:
    """What an owner has, and how all of it looks."""

    tenant: Tenant
    ids: dict[str, str]

    def state(self) -> dict[str, Any]:
        return {name: self.tenant.get(f"/v1/{name}").json()["data"] for name in LISTS}


@pytest.fixture
def owned(tenant: Tenant) -> Owned:
    table = tenant.table()
    task = tenant.made(f"/v1/vector-tables/{table['id']}/backfill", None)
    ids = {
        "environment_id": tenant.made("/v1/environments", {"name": unique("env")})["id"],
        "api_key_id": tenant.made("/v1/api-keys", {"name": "key"})["api_key"]["id"],
        "connection_id": table["connection_id"],
        "embedding_provider_id": table["embedding_provider_id"],
        "vector_table_id": table["id"],
        "task_id": task["task_id"],
    }
    return Owned(tenant, ids)


def _is_not_found(code: str, path: str) -> bool:
    nouns = re.findall(r"\{(\w+)_id\}", path)
    return code == f"{nouns[0]}_not_found"


def test_another_organization_finds_nothing_and_changes_nothing(owned: Owned, other: Tenant) -> None:
    before = owned.state()
    for method, path, body in OPERATIONS:
        response = other.send(method, path.format(**owned.ids), body)
        assert response.status_code == 404, (method, path, response.text)
        assert _is_not_found(code_of(response), path), (method, path)
        response = other.send(method, path.format(**owned.ids), body, environment=owned.tenant.environment_id)
        assert (response.status_code, code_of(response)) == (404, "environment_not_found"), (method, path)
    assert owned.state() == before


def test_another_environment_finds_nothing_and_changes_nothing(owned: Owned) -> None:
    before = owned.state()
    tenant = owned.tenant
    elsewhere = tenant.made("/v1/environments", {"name": "elsewhere"})["id"]
    before = owned.state()
    for method, path, body in OPERATIONS:
        if path.startswith(tuple(f"/v1/{name}/" for name in OF_THE_ORGANIZATION)):
            continue
        response = tenant.send(method, path.format(**owned.ids), body, environment=elsewhere)
        assert response.status_code == 404, (method, path, response.text)
        assert _is_not_found(code_of(response), path), (method, path)
    assert owned.state() == before


def test_lists_never_leak(owned: Owned, other: Tenant) -> None:
    elsewhere = owned.tenant.made("/v1/environments", {"name": "elsewhere"})["id"]
    for name in LISTS:
        seen = {row["id"] for row in other.get(f"/v1/{name}").json()["data"]}
        assert not seen & set(owned.ids.values()), name
        if name not in OF_THE_ORGANIZATION:
            assert owned.tenant.get(f"/v1/{name}", environment=elsewhere).json()["data"] == []
    assert other.get(f"/v1/tasks?target_id={owned.ids['vector_table_id']}").json()["data"] == []


@pytest.mark.parametrize("field", ["connection_id", "embedding_provider_id"])
def test_nothing_foreign_can_be_built_upon(owned: Owned, other: Tenant, field: str) -> None:
    body = other.table_body(**{field: owned.ids[field]})
    response = other.post("/v1/vector-tables", body)
    assert (response.status_code, code_of(response)) == (404, f"{field.removesuffix('_id')}_not_found")


def test_no_key_can_be_made_for_a_foreign_environment(owned: Owned, other: Tenant) -> None:
    body = {"name": "spy", "environment_id": owned.tenant.environment_id}
    assert code_of(other.post("/v1/api-keys", body)) == "environment_not_found"


def test_a_cursor_of_another_organization_shows_only_ones_own(owned: Owned, other: Tenant) -> None:
    for _ in range(2):
        owned.tenant.provider()
    cursor = owned.tenant.get("/v1/embedding-providers?limit=1").json()["pagination"]["next_cursor"]
    mine = other.provider()["id"]
    rows = other.get(f"/v1/embedding-providers?cursor={cursor}").json()["data"]
    assert {row["id"] for row in rows} <= {mine}
