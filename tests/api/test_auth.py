"""Keys, environments, and what a read_only key may do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.api.tenants import Tenant, code_of, unique

BAD_HEADERS = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic c2tfeDp5"},
    {"Authorization": "Bearer sk_"},
    {"Authorization": "Bearer sk_" + "A" * 43},
    {"Authorization": "Bearer pk_" + "A" * 43},
    {"Authorization": "Bearer sk_" + "A" * 10_000},
    {"Authorization": "Bearer sk_' OR '1'='1' -- aaaaaaaaaaaaaaaaaa"},
    {"Authorization": "Bearer sk_\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9"},
]


@pytest.mark.parametrize("headers", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_without_a_known_key_everything_is_a_401(client: TestClient, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = client.get("/v1/vector-tables", headers=raw)  # type: ignore[arg-type]
    assert (response.status_code, code_of(response)) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def _operations(client: TestClient) -> list[tuple[str, str]]:
    assert isinstance(client.app, FastAPI)
    paths = client.app.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods if path.startswith("/v1")]


def _filled(path: str) -> str:
    """The path with ids that are well formed and nobody's."""
    prefixes = {"environment": "env", "api_key": "key", "connection": "conn", "embedding_provider": "ep",
                "vector_table": "vt", "task": "task"}  # fmt: skip
    return re.sub(r"\{(\w+)_id\}", lambda match: f"{prefixes[match[1]]}_{'0' * 26}", path)


def test_no_operation_answers_without_a_key(client: TestClient) -> None:
    operations = _operations(client)
    assert len(operations) > 30
    for method, path in operations:
        # malformed as well: who is not known learns nothing about bodies
        response = client.request(method, _filled(path), content=b"{", headers={"Content-Type": "application/json"})
        assert (response.status_code, code_of(response)) == (401, "unauthorized"), (method, path)


def test_a_read_only_key_reads_and_queries_and_nothing_else(tenant: Tenant) -> None:
    key = tenant.new_key("read_only")
    for method, path in _operations(tenant.client):
        response = tenant.send(method, _filled(path), {"query": "x"} if path.endswith("/query") else None, key=key)
        if method == "GET" or path.endswith("/query"):
            assert response.status_code in (200, 404), (method, path, response.text)
        else:
            assert (response.status_code, code_of(response)) == (403, "permission_denied"), (method, path)


def test_a_revoked_key_stops_at_once(tenant: Tenant) -> None:
    made = tenant.made("/v1/api-keys", {"name": "short-lived"})
    assert tenant.get("/v1/tasks", key=made["key"]).status_code == 200
    assert tenant.delete(f"/v1/api-keys/{made['api_key']['id']}").status_code == 204
    response = tenant.get("/v1/tasks", key=made["key"])
    assert (response.status_code, code_of(response)) == (401, "key_revoked")
    assert tenant.delete(f"/v1/api-keys/{made['api_key']['id']}").status_code == 204


def test_the_scheme_is_read_without_regard_to_case(tenant: Tenant) -> None:
    assert tenant.get("/v1/tasks", headers={"Authorization": f"bearer {tenant.key}"}).status_code == 200


@pytest.mark.parametrize("value", ["staging", "", "Prod", "env_" + "0" * 26, "env_'; --", "x" * 1000])
def test_an_unknown_environment_is_a_404(tenant: Tenant, value: str) -> None:
    response = tenant.get("/v1/vector-tables", environment=value)
    assert (response.status_code, code_of(response)) == (404, "environment_not_found")


def test_an_environment_is_named_by_its_id_or_by_its_name(tenant: Tenant, other: Tenant) -> None:
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    other.made("/v1/environments", {"name": "theirs"})
    made = tenant.provider(environment="staging")
    assert made["environment_id"] == staging
    for spelled in ("staging", staging):
        assert [row["id"] for row in tenant.get("/v1/embedding-providers", environment=spelled).json()["data"]] == [
            made["id"]
        ]
    assert tenant.get("/v1/embedding-providers", environment="prod").json()["data"] == []
    assert code_of(tenant.get("/v1/embedding-providers", environment="theirs")) == "environment_not_found"
    key = tenant.new_key(environment_id=staging)
    assert tenant.get("/v1/embedding-providers", key=key, environment="staging").status_code == 200
    assert code_of(tenant.get("/v1/embedding-providers", key=key, environment="prod")) == "environment_not_found"


def test_a_query_takes_the_environments_name(tenant: Tenant) -> None:
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    table = tenant.made("/v1/vector-tables", tenant.table_body())["id"]
    path, body = f"/v1/vector-tables/{table}/query", {"query": "x"}
    only_staging = tenant.new_key(environment_id=staging)
    assert code_of(tenant.post(path, body, environment="prod")) == "vector_table_not_ready"
    assert code_of(tenant.post(path, body, environment="staging")) == "vector_table_not_found"
    for name in ("nowhere", "", "Prod"):
        assert code_of(tenant.post(path, body, environment=name)) == "environment_not_found"
        assert code_of(tenant.post(path, body, environment=name, key=only_staging)) == "environment_not_found"
    assert code_of(tenant.post(path, body, environment="prod", key=only_staging)) == "environment_not_found"
    assert code_of(tenant.post(path, body, environment="staging", key=only_staging)) == "vector_table_not_found"


def test_keys_that_a_key_makes_share_its_rate_limit(tenant: Tenant, app_with: Callable[..., TestClient]) -> None:
    limited = app_with(rate_limit_per_minute=5)

    def ask(key: str, method: str = "GET", path: str = "/v1/tasks", **more: Any) -> httpx.Response:
        return limited.request(method, path, headers={"Authorization": f"Bearer {key}"}, **more)

    first = ask(tenant.key, "POST", "/v1/api-keys", json={"name": "child"}).json()["key"]
    second = ask(first, "POST", "/v1/api-keys", json={"name": "grandchild"}).json()["key"]
    assert [ask(key).headers["x-ratelimit-remaining"] for key in (second, first, tenant.key)] == ["2", "1", "0"]
    assert {code_of(ask(key)) for key in (tenant.key, first, second)} == {"rate_limit_exceeded"}
    query = ask(second, "POST", f"/v1/vector-tables/vt_{'0' * 26}/query", json={"query": "x"})
    assert code_of(query) == "rate_limit_exceeded"
    # made by the operator: a caller of its own
    assert ask(tenant.new_key()).headers["x-ratelimit-remaining"] == "4"


def test_a_key_of_one_environment_knows_no_other(tenant: Tenant, other: Tenant) -> None:
    staging = tenant.made("/v1/environments", {"name": "staging"})["id"]
    key = tenant.new_key(environment_id=staging)
    provider = tenant.provider(key=key)
    assert provider["environment_id"] == staging
    assert tenant.get(f"/v1/embedding-providers/{provider['id']}").status_code == 404
    for foreign in (tenant.environment_id, other.environment_id):
        assert code_of(tenant.get("/v1/tasks", key=key, environment=foreign)) == "environment_not_found"
        assert code_of(tenant.get(f"/v1/environments/{foreign}", key=key)) == "environment_not_found"
        assert code_of(tenant.delete(f"/v1/environments/{foreign}", key=key)) == "environment_not_found"
        body = {"name": "escape", "environment_id": foreign}
        assert code_of(tenant.post("/v1/api-keys", body, key=key)) == "environment_not_found"
    assert [row["id"] for row in tenant.get("/v1/environments", key=key).json()["data"]] == [staging]
    assert code_of(tenant.post("/v1/environments", {"name": "more"}, key=key)) == "permission_denied"
    assert code_of(tenant.delete(f"/v1/environments/{staging}", key=key)) == "permission_denied"
    mine = tenant.made("/v1/api-keys", {"name": "mine"}, key=key)["api_key"]
    assert mine["environment_id"] == staging
    listed = {row["id"] for row in tenant.get("/v1/api-keys", key=key).json()["data"]}
    assert mine["id"] in listed
    assert all(row["environment_id"] == staging for row in tenant.get("/v1/api-keys", key=key).json()["data"])
    whole = tenant.made("/v1/api-keys", {"name": "whole"})["api_key"]
    assert code_of(tenant.delete(f"/v1/api-keys/{whole['id']}", key=key)) == "api_key_not_found"


def test_keys_are_shown_once(tenant: Tenant) -> None:
    made = tenant.made("/v1/api-keys", {"name": "frontend", "permission": "read_only"})
    assert re.fullmatch(r"sk_[A-Za-z0-9_-]{43}", made["key"])
    assert made["api_key"]["prefix"] == made["key"][:12]
    assert made["key"] not in tenant.get("/v1/api-keys").text


class TestEnvironments:
    def test_life(self, tenant: Tenant) -> None:
        made = tenant.made("/v1/environments", {"name": "staging"})
        assert tenant.get(f"/v1/environments/{made['id']}").json() == made
        assert code_of(tenant.post("/v1/environments", {"name": "staging"})) == "name_conflict"
        provider = tenant.provider(environment=made["id"])
        response = tenant.delete(f"/v1/environments/{made['id']}")
        assert (response.status_code, code_of(response)) == (409, "environment_conflict")
        assert "1 embedding provider" in response.json()["error"]["message"]
        assert tenant.delete(f"/v1/embedding-providers/{provider['id']}", environment=made["id"]).status_code == 204
        assert tenant.delete(f"/v1/environments/{made['id']}").status_code == 204
        assert tenant.get(f"/v1/environments/{made['id']}").status_code == 404

    def test_prod_stays(self, tenant: Tenant) -> None:
        assert code_of(tenant.delete(f"/v1/environments/{tenant.environment_id}")) == "environment_conflict"

    @pytest.mark.parametrize("name", ["", "Prod", "a b", "x" * 51, "é", "a\n", 5, None])
    def test_bad_names(self, tenant: Tenant, name: object) -> None:
        response = tenant.post("/v1/environments", {"name": name})
        assert (response.status_code, code_of(response)) == (422, "validation_error")
        assert "name" in response.json()["error"]["message"]


class TestRateLimit:
    def test_the_window_is_told_and_kept(self, tenant: Tenant, app_with: Callable[..., TestClient]) -> None:
        tenant.client = app_with(rate_limit_per_minute=3)
        left = []
        for _ in range(3):
            response = tenant.get("/v1/tasks")
            assert (response.status_code, response.headers["x-ratelimit-limit"]) == (200, "3")
            left.append(int(response.headers["x-ratelimit-remaining"]))
        assert left == [2, 1, 0]
        response = tenant.get(f"/v1/tasks/task_{'0' * 26}")
        assert (response.status_code, code_of(response)) == (429, "rate_limit_exceeded")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert int(response.headers["x-ratelimit-reset"]) > 1_700_000_000
        # each key for itself
        assert tenant.get("/v1/tasks", key=tenant.new_key()).status_code == 200

    def test_zero_is_off(self, tenant: Tenant) -> None:
        assert "x-ratelimit-limit" not in tenant.get("/v1/tasks").headers


def test_the_request_id_of_a_caller_is_kept_if_it_is_sane(tenant: Tenant) -> None:
    assert tenant.get("/v1/tasks", headers={"X-Request-Id": "trace-1.a_B"}).headers["x-request-id"] == "trace-1.a_B"
    for odd in ("a b", "x" * 65, 'a"b', "", unique("ä").encode()):
        given = tenant.get("/v1/tasks", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert re.fullmatch(r"req_[0-9a-z]{26}", given)
