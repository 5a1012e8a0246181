"""Connections: made, tested, looked into, never showing a secret."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient

from tests.api.tenants import Tenant, code_of, unique

PATH = "/v1/providers/postgresql/connections"


def test_life(tenant: Tenant) -> None:
    made = tenant.connection()
    assert set(made) == {
        "id", "org_id", "environment_id", "name", "provider", "mode", "status", "settings", "last_error", "tested_at",
        "created_at", "updated_at",
    }  # fmt: skip
    assert (made["status"], made["last_error"]) == ("connected", None)
    assert "password" not in made["settings"]
    path = f"/v1/connections/{made['id']}"
    assert tenant.get(path).json() == made
    test = tenant.post(f"{path}/test").json()
    assert (test["status"], test["error"], set(test)) == ("ok", None, {"status", "latency_ms", "error"})
    names = {table["name"]: table["type"] for table in tenant.get(f"{path}/tables").json()["tables"]}
    assert (names["products"], names["product_view"]) == ("table", "view")
    short = tenant.get(f"{path}/tables?limit=1").json()
    assert (len(short["tables"]), short["truncated"]) == (1, True)
    assert tenant.put(path, {"name": "renamed"}).json()["status"] == "connected"
    assert tenant.delete(path).status_code == 204
    assert tenant.get(path).status_code == 404


def test_a_password_with_every_awkward_character(tenant: Tenant) -> None:
    credentials = {**tenant.credentials, "user": "reader", "password": "p@ss/w:o%rd"}
    made = tenant.made(PATH, {"name": "odd", "mode": "managed", "credentials": credentials})
    assert made["status"] == "connected", made
    everything = tenant.get("/v1/connections").text + tenant.get(f"/v1/connections/{made['id']}").text
    assert "p@ss" not in everything


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"password": "wrong-canary"}, "password"),
        ({"port": 1}, "No connection"),
        ({"database": "no_such_database"}, "no_such_database"),
        ({"host": "no-such-host.invalid"}, "does not resolve"),
        ({"host": "169.254.169.254"}, "metadata"),
        ({"ssl_mode": "verify-full"}, "SSL"),
    ],
)
def test_what_does_not_connect_is_kept_as_failed(tenant: Tenant, changes: dict[str, Any], says: str) -> None:
    response = tenant.post(PATH, {"name": "bad", "mode": "managed", "credentials": {**tenant.credentials, **changes}})
    assert response.status_code == 201
    made = response.json()
    assert made["status"] == "failed"
    assert says in made["last_error"]
    assert "canary" not in response.text
    test = tenant.post(f"/v1/connections/{made['id']}/test")
    assert (test.status_code, test.json()["status"]) == (200, "failed")
    # other credentials are tested at once
    good = tenant.put(f"/v1/connections/{made['id']}", {"credentials": tenant.credentials}).json()
    assert (good["status"], good["last_error"]) == ("connected", None)


def test_platform_mode_wants_a_schema_to_write_to(tenant: Tenant) -> None:
    with psycopg.connect(tenant.source.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    credentials = {**tenant.credentials, "user": "reader", "password": "p@ss/w:o%rd"}
    made = tenant.made(PATH, {"name": "narrow", "mode": "platform", "credentials": credentials})
    assert made["status"] == "failed"
    assert "GRANT" in made["last_error"]


def test_private_networks_can_be_denied(tenant: Tenant, app_with: Callable[..., TestClient]) -> None:
    tenant.client = app_with(deny_private_networks=True)
    made = tenant.made(PATH, {"name": "inside", "mode": "managed", "credentials": tenant.credentials})
    assert (made["status"], "private" in made["last_error"]) == ("failed", True)
    body = {"name": "x", "provider": "openai", "credentials": {"base_url": "http://localhost:1/v1"}}
    response = tenant.post("/v1/embedding-providers", body)
    assert (response.status_code, code_of(response)) == (422, "validation_error")


@pytest.mark.parametrize("provider", ["mysql", "snowflake", "oracle", "x" * 90])
def test_other_providers_are_refused_by_name(tenant: Tenant, provider: str) -> None:
    response = tenant.post(f"/v1/providers/{provider}/connections", {})
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert "supported: postgresql" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"port": "5432"}, "credentials.port"),
        ({"port": 0}, "credentials.port"),
        ({"port": 65536}, "credentials.port"),
        ({"host": "a,b"}, "credentials.host"),
        ({"host": ""}, "credentials.host"),
        ({"host": "a b"}, "credentials.host"),
        ({"ssl_mode": "maybe"}, "credentials.ssl_mode"),
        ({"user": None}, "credentials.user"),
        ({"sslrootcert": "/etc/passwd"}, "sslrootcert"),
    ],
)
def test_bad_credentials_are_refused(tenant: Tenant, changes: dict[str, Any], says: str) -> None:
    body = {"name": "bad", "mode": "managed", "credentials": {**tenant.credentials, **changes}}
    response = tenant.post(PATH, body)
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert says in response.json()["error"]["message"]
    assert tenant.get("/v1/connections").json()["data"] == []


def test_mode_and_provider_stay(tenant: Tenant) -> None:
    made = tenant.connection()
    for field in ("mode", "provider", "status"):
        response = tenant.put(f"/v1/connections/{made['id']}", {field: "platform"})
        assert (response.status_code, "cannot be changed" in response.text) == (422, True)


def test_what_is_used_is_kept(tenant: Tenant) -> None:
    table = tenant.table(name="the user")
    for path, code in (
        (f"/v1/connections/{table['connection_id']}", "connection_conflict"),
        (f"/v1/embedding-providers/{table['embedding_provider_id']}", "embedding_provider_conflict"),
    ):
        response = tenant.delete(path)
        assert (response.status_code, code_of(response)) == (409, code)
        assert "the user" in response.json()["error"]["message"]


def test_names_are_unique(tenant: Tenant) -> None:
    first, second = tenant.connection(), tenant.connection()
    taken = {"name": first["name"], "mode": "managed", "credentials": tenant.credentials}
    assert code_of(tenant.post(PATH, taken)) == "name_conflict"
    assert code_of(tenant.put(f"/v1/connections/{second['id']}", {"name": first["name"]})) == "name_conflict"
    staging = tenant.made("/v1/environments", {"name": unique("e")})["id"]
    assert tenant.post(PATH, taken, environment=staging).status_code == 201
