"""The application over a real catalog, with a customer's database in the same PostgreSQL server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import URL, make_url

from api.app import create_app
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.settings import Settings
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.api.tenants import Tenant

_SOURCE = r'''
CREATE TABLE products (
    id integer PRIMARY KEY, title text NOT NULL, description text, category text, price numeric(10, 2), in_stock boolean,
    tags text[], code text, twice integer);
INSERT INTO products SELECT n, 'product ' || n, 'about ' || n, 'c' || n % 3, n / 10.0, n % 2 = 0, '{}', 'x', n % 5
    FROM generate_series(1, 30) n;
ANALYZE products;
CREATE SCHEMA "Odd Schema";
CREATE TABLE "Odd Schema"."Mixed ""Case""" ("Id" uuid PRIMARY KEY, "Title" text);
CREATE VIEW product_view AS SELECT id, title FROM products;
CREATE TABLE secret (id integer PRIMARY KEY, title text);
CREATE ROLE reader LOGIN PASSWORD 'p@ss/w:o%rd';
GRANT SELECT ON products TO reader;
'''


def _new_database(postgres: EmbeddedPostgres) -> str:
    name = f"api_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return postgres.url(name)


@pytest.fixture(scope="session")
def catalog_url(postgres: EmbeddedPostgres) -> str:
    """A migrated catalog of these tests; each takes an organization of its own in it."""
    url = _new_database(postgres)
    upgrade(url)
    return url


@pytest.fixture(scope="session")
def source(postgres: EmbeddedPostgres) -> URL:
    """A customer's database."""
    url = _new_database(postgres)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_SOURCE)
    return make_url(url)


@pytest.fixture(scope="session")
def catalog(catalog_url: str) -> Iterator[Catalog]:
    found = Catalog(catalog_url)
    yield found
    found.close()


@pytest.fixture(scope="session")
def settings(catalog_url: str) -> Settings:
    """Without Dagster, without a rate limit, and with a Qdrant that nobody needs."""
    return Settings(
        database_url=catalog_url,  # type: ignore[arg-type]
        encryption_keys=(new_encryption_key(),),  # type: ignore[arg-type]
        qdrant_url="http://127.0.0.1:1",
        rate_limit_per_minute=0,
    )


@pytest.fixture(scope="session")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as running:
        yield running


@pytest.fixture
def tenant(client: TestClient, catalog: Catalog, source: URL) -> Tenant:
    """An organization of this test alone."""
    return Tenant.create(client, catalog, source)


@pytest.fixture
def other(client: TestClient, catalog: Catalog, source: URL) -> Tenant:
    """Another organization."""
    return Tenant.create(client, catalog, source)


@pytest.fixture
def app_with(settings: Settings) -> Iterator[Callable[..., TestClient]]:
    """Further applications over the same catalog, with other settings."""
    running: list[TestClient] = []

    def start(**changes: Any) -> TestClient:
        client = TestClient(create_app(settings.model_copy(update=changes)))
        client.__enter__()
        running.append(client)
        return client

    yield start
    for client in running:
        client.__exit__(None, None, None)
