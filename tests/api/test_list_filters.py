"""Filters of lists, their cursors, and query parameters that an operation does not know."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.tenants import Tenant, code_of

_UNKNOWN = "vt_" + "0" * 26


def _names(tenant: Tenant, path: str) -> list[str]:
    return [row["name"] for row in tenant.get(path).json()["data"]]


def test_lists_filter_by_name_exactly(tenant: Tenant, other: Tenant) -> None:
    for name in ("Shop", "shop", "shop 2", "50%_'"):
        provider = {"name": name, "provider": "local"}
        tenant.made("/v1/embedding-providers", provider)
        other.made("/v1/embedding-providers", provider)
        tenant.made("/v1/api-keys", {"name": name})
    connection = tenant.connection()["name"]
    tenant.connection()
    tenant.made("/v1/environments", {"name": "staging"})
    for path in ("embedding-providers", "api-keys"):
        for name in ("Shop", "shop 2", "50%_'"):
            response = tenant.get(f"/v1/{path}", params={"name": name})
            assert [row["name"] for row in response.json()["data"]] == [name]
        assert _names(tenant, f"/v1/{path}?name=sho") == []
    assert _names(tenant, f"/v1/connections?name={connection}") == [connection]
    assert _names(tenant, "/v1/environments?name=staging") == ["staging"]
    only_prod = tenant.new_key(environment_id=tenant.environment_id)
    assert tenant.get("/v1/environments?name=staging", key=only_prod).json()["data"] == []
    (model,) = tenant.get("/v1/embedding-models?name=text-embedding-3-small").json()["data"]
    assert model["model"] == "text-embedding-3-small"


def test_vector_tables_filter_by_each_field_and_by_all_together(tenant: Tenant) -> None:
    provider = tenant.provider()["id"]
    first, second = (
        tenant.table(source_table=spelled, embedding_provider_id=provider)
        for spelled in ("products", "public.products")
    )
    tenant.post(f"/v1/vector-tables/{second['id']}/sync/pause")
    path = "/v1/vector-tables"
    for query in (
        f"name={first['name']}",
        "sync_status=pending",
        f"connection_id={first['connection_id']}",
        "source_table=products",
        f"source_table=products&sync_status=pending&name={first['name']}&connection_id={first['connection_id']}",
    ):
        assert _names(tenant, f"{path}?{query}") == [first["name"]], query
    assert _names(tenant, f"{path}?sync_status=paused&source_table=products") == []
    wrong = tenant.get(f"{path}?sync_status=ready")
    assert code_of(wrong) == "validation_error"
    assert "'pending'" in wrong.json()["error"]["message"]


def test_tasks_filter_by_their_vector_tables_name(tenant: Tenant) -> None:
    first, second = tenant.table(), tenant.table()
    started = [tenant.made(f"/v1/vector-tables/{table['id']}/backfill", None)["task_id"] for table in (first, second)]
    found = tenant.get(f"/v1/tasks?name={second['name']}").json()["data"]
    assert [task["id"] for task in found] == [started[1]]
    assert tenant.get("/v1/tasks?name=nothing").json()["data"] == []


def test_a_cursor_goes_on_only_with_its_own_filters(tenant: Tenant) -> None:
    for _ in range(3):
        tenant.made("/v1/api-keys", {"name": "twin"})
    tenant.made("/v1/api-keys", {"name": "other"})
    first = tenant.get("/v1/api-keys?limit=2&name=twin").json()
    cursor = first["pagination"]["next_cursor"]
    rest = tenant.get(f"/v1/api-keys?limit=2&name=twin&cursor={cursor}").json()
    assert (len(first["data"]), len(rest["data"]), rest["pagination"]["next_cursor"]) == (2, 1, None)
    unfiltered = tenant.get("/v1/api-keys?limit=2").json()["pagination"]["next_cursor"]
    for query in (f"cursor={cursor}", f"name=other&cursor={cursor}", f"name=twin&cursor={unfiltered}"):
        response = tenant.get(f"/v1/api-keys?{query}")
        assert code_of(response) == "validation_error"
        assert "other filters" in response.json()["error"]["message"]


@pytest.mark.parametrize("query", ["nam=shop", "Name=shop", "name=shop&colour=red", "limit[]=5", "%00=1", "="])
def test_an_unknown_query_parameter_is_a_422_that_names_what_is_accepted(tenant: Tenant, query: str) -> None:
    response = tenant.get(f"/v1/connections?{query}")
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "accepted: limit, cursor, name" in response.json()["error"]["message"]


def test_a_query_parameter_given_twice_is_a_422(tenant: Tenant) -> None:
    response = tenant.get("/v1/connections?name=a&name=b")
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "name: this query parameter is given 2 times" in response.json()["error"]["message"]


def test_no_operation_takes_an_unknown_query_parameter(tenant: Tenant, client: TestClient) -> None:
    document: dict[str, Any] = client.get("/openapi.json").json()
    seen = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            filled = re.sub(r"\{\w+\}", _UNKNOWN, path)
            response = tenant.send(method.upper(), f"{filled}?colour=red")
            assert (response.status_code, code_of(response)) == (422, "validation_error"), (method, path)
            message = response.json()["error"]["message"]
            assert "'colour'" in message, (method, path)
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query":
                    assert parameter["name"] in message, (method, path)
            if path.startswith("/v1"):
                without_key = client.request(method.upper(), f"{filled}?colour=red")
                assert code_of(without_key) == "unauthorized", (method, path)
            seen += 1
    assert seen > 30
