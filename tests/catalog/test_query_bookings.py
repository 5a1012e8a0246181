"""What queries use of a provider's limits a minute, runs find missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from embedd_dagster.catalog import migrate
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.provider_budgets import CatalogBudget
from embedd_dagster.catalog.query_bookings import QueryBookings

PROVIDER = "ep_1"
LIMITS: dict[str, Any] = {"requests_per_minute": 60, "tokens_per_minute": None, "concurrency": 2}


@pytest.fixture
def url(database_url: str) -> str:
    migrate.upgrade(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO embedding_providers"
            " (id, org_id, environment_id, name, provider, credentials, limits, created_at, updated_at)"
            " SELECT %s, org_id, id, 'p', 'openai', '', '{}', now(), now() FROM environments",
            [PROVIDER],
        )
    return database_url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(url, pool_size=2)
    yield opened
    opened.close()


def _levels(url: str) -> dict[str, float]:
    with psycopg.connect(url) as connection:
        return dict(connection.execute("SELECT kind, level FROM provider_budgets").fetchall())


def test_a_run_finds_less_left(catalog: Catalog, url: str) -> None:
    bookings = QueryBookings(catalog, seconds_between=3600)
    for _ in range(30):
        bookings.note(PROVIDER, LIMITS, tokens=7)
    assert _levels(url) == {}  # a query itself costs the catalog nothing
    bookings.book()
    assert _levels(url)["requests"] == pytest.approx(30)
    budget = CatalogBudget.from_limits(catalog, PROVIDER, LIMITS)
    assert budget is not None
    # one a second drains; a second's burst is free
    assert budget.acquire(1, 100) == pytest.approx(30 - 1, abs=3)
    bookings.close()


def test_without_a_limit_a_minute_nothing_is_booked(catalog: Catalog, url: str) -> None:
    bookings = QueryBookings(catalog)
    for limits in ({}, {"concurrency": 4}, {"requests_per_minute": None, "tokens_per_minute": None}):
        bookings.note(PROVIDER, limits, tokens=7)
    bookings.close()
    bookings.book()
    assert _levels(url) == {}


def test_debts_end_after_a_minute(catalog: Catalog, url: str) -> None:
    bookings = QueryBookings(catalog, seconds_between=3600)
    limits = {"requests_per_minute": 60, "tokens_per_minute": 600}
    for _ in range(2):
        for _ in range(500):
            bookings.note(PROVIDER, limits, tokens=100)
        bookings.book()
        assert _levels(url) == {"requests": 60, "tokens": 600}
    bookings.close()


def test_what_cannot_be_booked_is_booked_later(catalog: Catalog, url: str) -> None:
    down = Catalog("postgresql://nobody@127.0.0.1:1/nothing")
    bookings = QueryBookings(down, seconds_between=3600)
    bookings.note(PROVIDER, LIMITS, tokens=7)
    bookings.book()
    bookings.note(PROVIDER, LIMITS, tokens=7)
    bookings._catalog = catalog
    bookings.book()
    assert _levels(url)["requests"] == pytest.approx(2)
    bookings.note("ep_gone", LIMITS, tokens=7)
    bookings.note(PROVIDER, LIMITS, tokens=7)
    bookings.close()
    assert _levels(url)["requests"] > 2  # a provider that was deleted stops nobody
    down.close()
