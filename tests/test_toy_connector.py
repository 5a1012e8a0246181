"""A connector that is registered at run time works from the API to its stores; no product code knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import make_url

from api.app import create_app
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.connectors.registry import registered
from embedd_dagster.engine.run import run_task
from embedd_dagster.settings import Settings
from tests.api.tenants import Tenant, code_of
from tests.support.toy_connector.database import Database, create_database
from tests.support.toy_connector.spec import MANAGED_SETS, MODEL, SPEC

COLUMNS = [
    {"name": "title", "role": "embedding", "ordinal": 1},
    {"name": "price", "role": "metadata", "filter_type": "float"},
]
CREDENTIALS = {"database": "shop", "token": "open sesame"}


@pytest.fixture
def database() -> Database:
    database = create_database(CREDENTIALS["database"], CREDENTIALS["token"])
    database.execute("CREATE TABLE products (id integer PRIMARY KEY, title varchar(100), price numeric(10, 2))")
    for number in range(1, 31):
        database.execute("INSERT INTO products VALUES (?, ?, ?)", (number, f"product {number}", number / 2))
    return database


@pytest.fixture
def tenant(database_url: str) -> Iterator[Tenant]:
    upgrade(database_url)
    settings = Settings(
        database_url=database_url,  # type: ignore[arg-type]
        encryption_keys=(new_encryption_key(),),  # type: ignore[arg-type]
        qdrant_url="http://127.0.0.1:1",
        managed_store="toy",
        rate_limit_per_minute=0,
        retired_set_grace_seconds=0,
    )
    catalog = Catalog(database_url)
    with registered(SPEC), TestClient(create_app(settings)) as client:
        yield Tenant.create(client, catalog, make_url(database_url))
    catalog.close()


def connect(tenant: Tenant, mode: str, **credentials: str) -> dict[str, Any]:
    body = {"name": mode, "mode": mode, "credentials": {**CREDENTIALS, **credentials}}
    return tenant.made("/v1/providers/toy/connections", body)


def run(tenant: Tenant, task_id: str) -> None:
    run_task(tenant.state.runtime, task_id, uuid4().hex, log=lambda _text: None, should_stop=lambda: False)


def query(tenant: Tenant, path: str, text: str, **more: Any) -> list[Any]:
    response = tenant.post(f"{path}/query", {"query": text, "limit": 3, **more})
    assert response.status_code == 200, response.text
    return [(row["id"], row["metadata"]) for row in response.json()["results"]]


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_a_table_is_built_searched_and_synced(tenant: Tenant, database: Database, mode: str) -> None:
    connection = connect(tenant, mode)
    assert (connection["status"], connection["settings"]) == ("connected", {"database": "shop"})
    body: dict[str, Any] = {
        "name": "products",
        "mode": mode,
        "connection_id": connection["id"],
        "source_table": "products",
        "primary_key_column": "id",
        "columns": COLUMNS,
        "embedding_model": MODEL,
        "embedding_dimensions": 16,
    }
    if mode == "managed":  # in platform mode the source embeds by itself
        provider = tenant.made("/v1/embedding-providers", {"name": "words", "provider": "toy"})
        assert provider["status"] == "connected"
        body["embedding_provider_id"] = provider["id"]
    table = tenant.made("/v1/vector-tables", body)
    path = f"/v1/vector-tables/{table['id']}"
    assert tenant.post(f"{path}/estimate").json()["rows"] == 30

    run(tenant, tenant.post(f"{path}/backfill").json()["task_id"])
    assert query(tenant, path, "product 7")[0] == (7, {"price": 3.5})
    assert query(tenant, path, "product 7", filters={"price": {"gt": 14.5}}) == [(30, {"price": 15.0})]
    sets = MANAGED_SETS if mode == "managed" else database.sets
    assert len(sets.read_public(table["qdrant_collection"] or table["platform_vector_ref"].removeprefix("main/"))) == 30

    database.execute("UPDATE products SET title = 'a teapot' WHERE id = 8")
    database.execute("DELETE FROM products WHERE id = 7")
    run(tenant, tenant.post(f"{path}/sync").json()["task_id"])
    assert query(tenant, path, "a teapot")[0][0] == 8
    assert 7 not in [key for key, _ in query(tenant, path, "product 7", limit=100)]


def test_ready_names_the_store_in_use(tenant: Tenant) -> None:
    assert set(tenant.get("/ready?for=query").json()["checks"]) == {"catalog", "toy"}


def test_credentials_are_validated_by_the_connections_provider(tenant: Tenant, database: Database) -> None:
    path = f"/v1/connections/{connect(tenant, 'managed', token='wrong')['id']}"
    failed = tenant.get(path).json()
    assert (failed["status"], "token is wrong" in failed["last_error"]) == ("failed", True)
    corrected = tenant.put(path, {"credentials": {"token": CREDENTIALS["token"]}}).json()
    assert (corrected["status"], corrected["settings"]) == ("connected", {"database": "shop"})
    refused = tenant.put(path, {"credentials": {"host": "h", "database": "d", "user": "u"}})
    assert (refused.status_code, code_of(refused)) == (422, "validation_error")
    assert "'host' is not known; accepted: database, token" in refused.json()["error"]["message"]


def test_the_description_of_the_api_lists_it(tenant: Tenant) -> None:
    document = tenant.get("/openapi.json").json()
    assert document["paths"]["/v1/providers/toy/connections"]["post"]["operationId"] == "create_toy_connection"
    schemas = document["components"]["schemas"]
    assert "toy" in schemas["EmbeddingProviderCreate"]["properties"]["provider"]["enum"]
    choice = [
        model["$ref"].rpartition("/")[2] for model in schemas["ConnectionUpdate"]["properties"]["credentials"]["oneOf"]
    ]
    assert choice == ["PostgresqlCredentials", "PostgresqlPassword", "ToyCredentials", "ToyToken"]
    assert schemas["ToyCredentials"]["required"] == ["database", "token"]


def test_a_table_that_cannot_be_followed_is_refused(tenant: Tenant, database: Database) -> None:
    body = {
        "name": "followed",
        "mode": "platform",
        "connection_id": connect(tenant, "platform")["id"],
        "source_table": "products",
        "primary_key_column": "id",
        "columns": COLUMNS,
        "embedding_model": MODEL,
        "embedding_dimensions": 16,
        "sync_mode": "cdc",
    }
    refused = tenant.post("/v1/vector-tables", body)
    assert (refused.status_code, "no log of changes" in refused.json()["error"]["message"]) == (422, True)
