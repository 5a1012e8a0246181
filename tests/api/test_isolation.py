"""Another organization and another environment: for every operation a 404, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from embedd_dagster.catalog.tables import Base
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
    ("GET", "/v1/connections/{connection_id}/tables/{table}/columns", None),
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


# every operation under /v1 without one: lists and creations, which the tests below try too
WITHOUT_ID = {
    *(("GET", f"/v1/{name}") for name in (*LISTS, "embedding-models")),
    *(("POST", f"/v1/{name}") for name in ("environments", "api-keys", "embedding-providers", "vector-tables")),
    ("POST", "/v1/providers/postgresql/connections"),
}


def _documented(client: TestClient) -> set[tuple[str, str]]:
    paths = client.app.openapi()["paths"]  # type: ignore[attr-defined]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods if path.startswith("/v1/")}


def test_every_operation_is_tried(client: TestClient) -> None:
    assert _documented(client) == {(method, path) for method, path, _body in OPERATIONS} | WITHOUT_ID


@dataclass
class Owned:
    """What an owner has, and how all of it looks."""

    tenant: Tenant
    ids: dict[str, str]

    def state(self) -> dict[str, Any]:
        """All that the API shows of it, and every row of the catalog that names the organization or anything of it."""
        told = {name: self.tenant.get(f"/v1/{name}").json()["data"] for name in LISTS}
        named = [self.tenant.org_id, *self.ids.values()]
        with self.tenant.catalog.transaction() as session:
            for table in Base.metadata.sorted_tables:
                rows = session.execute(text(f'SELECT to_jsonb(t)::text FROM "{table.name}" t ORDER BY 1')).scalars()
                told[table.name] = [row for row in rows if any(name in row for name in named)]
        return told


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
        "table": "products",
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
        again = {"environment": owned.tenant.environment_id, "headers": {"Idempotency-Key": "guessed"}}
        response = other.send(method, path.format(**owned.ids), body, **again)
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


def test_a_key_of_another_environment_finds_nothing_and_changes_nothing(owned: Owned) -> None:
    """Such a key knows its own environment alone, so the organization's objects are not there for it either."""
    tenant = owned.tenant
    elsewhere = tenant.made("/v1/environments", {"name": "elsewhere"})["id"]
    key = tenant.new_key(environment_id=elsewhere)
    before = owned.state()
    for method, path, body in OPERATIONS:
        response = tenant.send(method, path.format(**owned.ids), body, key=key)
        assert response.status_code == 404, (method, path, response.text)
        assert _is_not_found(code_of(response), path), (method, path)
        response = tenant.send(method, path.format(**owned.ids), body, key=key, environment=tenant.environment_id)
        assert (response.status_code, code_of(response)) == (404, "environment_not_found"), (method, path)
    assert owned.state() == before
    for name in LISTS:
        told = {row["id"] for row in tenant.get(f"/v1/{name}", key=key).json()["data"]}
        assert not told & set(owned.ids.values()), name


def test_a_read_only_key_changes_nothing(owned: Owned) -> None:
    """GETs and queries, on objects that are there; everything else is refused whether they are or not."""
    key = owned.tenant.new_key("read_only")
    before = owned.state()
    for method, path, body in OPERATIONS:
        response = owned.tenant.send(method, path.format(**owned.ids), body, key=key)
        if path.endswith("/query"):
            assert (response.status_code, code_of(response)) == (422, "vector_table_not_ready")
        elif method == "GET":
            assert response.status_code == 200, (path, response.text)
        else:
            assert (response.status_code, code_of(response)) == (403, "permission_denied"), (method, path)
    for method, path in WITHOUT_ID:
        response = owned.tenant.send(method, path, {} if method == "POST" else None, key=key)
        assert response.status_code == (200 if method == "GET" else 403), (method, path)
    assert owned.state() == before


def test_a_revoked_key_stops_at_once_everywhere(owned: Owned, app_with: Callable[..., TestClient]) -> None:
    """A process may have cached it: the key is revoked through another one."""
    tenant = owned.tenant
    made = tenant.made("/v1/api-keys", {"name": "leaver"})
    for method, path, body in OPERATIONS:
        if method == "GET" or path.endswith("/query"):
            assert tenant.send(method, path.format(**owned.ids), body, key=made["key"]).status_code in (200, 422)
    headers = {"Authorization": f"Bearer {tenant.key}"}
    assert app_with().delete(f"/v1/api-keys/{made['api_key']['id']}", headers=headers).status_code == 204
    before = owned.state()
    everything = [*OPERATIONS, *((method, path, {} if method == "POST" else None) for method, path in WITHOUT_ID)]
    for method, path, body in everything:
        response = tenant.send(method, path.format(**owned.ids), body, key=made["key"])
        assert (response.status_code, code_of(response)) == (401, "key_revoked"), (method, path)
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
    tenant = owned.tenant
    elsewhere = tenant.made("/v1/environments", {"name": "elsewhere"})["id"]
    at_home = {
        "connection_id": tenant.connection(environment=elsewhere)["id"],
        "embedding_provider_id": tenant.provider(environment=elsewhere)["id"],
    }
    body = tenant.table_body(**{**at_home, field: owned.ids[field]})
    response = tenant.post("/v1/vector-tables", body, environment=elsewhere)
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
