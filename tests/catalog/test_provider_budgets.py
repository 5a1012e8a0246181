"""A provider's limits a minute, kept over several processes, each with a catalog connection of its own."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from sqlalchemy import ColumnElement, literal
from sqlalchemy.dialects.postgresql import TIMESTAMP

from embedd_dagster.catalog import migrate
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.provider_budgets import CatalogBudget
from embedd_dagster.errors import EmbeddingRateLimited

PROVIDER = "ep_1"


class Clock:
    """One time for the processes and the database."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def of_database(self) -> ColumnElement[datetime]:
        instant = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now)
        return literal(instant, TIMESTAMP(timezone=True))


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
def catalogs(url: str) -> Iterator[list[Catalog]]:
    opened = [Catalog(url, pool_size=2) for _ in range(3)]
    yield opened
    for catalog in opened:
        catalog.close()


def most_in(window: float, sent: list[tuple[float, float]]) -> float:
    """The most units that were sent in any window of this length."""
    sent = sorted(sent)
    return max(sum(units for at, units in sent if start <= at < start + window) for start, _ in sent)


@pytest.mark.parametrize("seed", range(4))
def test_processes_together_stay_within_the_limits_of_any_window(catalogs: list[Catalog], seed: int) -> None:
    chance = random.Random(seed)
    clock = Clock()
    limits = {"requests": 600, "tokens": 60_000}
    budgets = [
        CatalogBudget(catalog, PROVIDER, limits, clock=clock, database_clock=clock.of_database) for catalog in catalogs
    ]
    free_at = [0.0] * len(budgets)  # a process sends one request after the other
    requests, tokens = [], []
    while clock.now < 30:
        number = min(range(len(budgets)), key=free_at.__getitem__)
        clock.now = free_at[number]
        size = chance.choice([10, 100, 400])
        at = clock.now + budgets[number].acquire(1, size)
        requests.append((at, 1.0))
        tokens.append((at, float(size)))
        # now and then one pauses, and comes back with what it may still hold
        free_at[number] = at + chance.choice([0.0, 0.0, 0.01, 0.1, 0.7, 3.0])
    for window in (1.0, 5.0, 20.0):
        assert most_in(window, requests) <= 10 * (window + 2) + len(budgets)
        assert most_in(window, tokens) <= 1000 * (window + 2) + 400 * len(budgets)


def test_several_processes_use_what_the_limit_allows_and_no_more(catalogs: list[Catalog]) -> None:
    clock = Clock()
    budgets = [
        CatalogBudget(catalog, PROVIDER, {"tokens": 60_000}, clock=clock, database_clock=clock.of_database)
        for catalog in catalogs
    ]
    free_at = [0.0] * len(budgets)
    sent = []
    while min(free_at) < 20:
        number = min(range(len(budgets)), key=free_at.__getitem__)
        clock.now = free_at[number]
        free_at[number] = clock.now + budgets[number].acquire(1, 330)
        sent.append((free_at[number], 330.0))
    used = sum(units for at, units in sent if at < 20)
    assert 0.9 * 20_000 <= used <= 22_000


def test_a_request_above_the_limit_goes_when_all_before_is_paid_and_others_wait_for_it(
    catalogs: list[Catalog],
) -> None:
    clock = Clock()
    one, other = (
        CatalogBudget(catalog, PROVIDER, {"tokens": 60_000}, clock=clock, database_clock=clock.of_database)
        for catalog in catalogs[:2]
    )
    assert one.acquire(1, 10_000) == 0
    assert other.acquire(1, 1_000) == pytest.approx(10)
    clock.now = 10
    assert one.acquire(1, 1_000) == pytest.approx(1)


def test_one_transaction_serves_about_a_second(catalogs: list[Catalog], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    budget = CatalogBudget(catalogs[0], PROVIDER, {"requests": 60_000}, clock=clock, database_clock=clock.of_database)
    transactions = 0
    transaction = catalogs[0].transaction

    def counted() -> object:
        nonlocal transactions
        transactions += 1
        return transaction()

    monkeypatch.setattr(catalogs[0], "transaction", counted)
    for _ in range(2_000):
        clock.now += budget.acquire(1, 0) + 0.005
    assert transactions <= 25  # in ten seconds, the first few of them to learn what is needed


def test_threads_of_several_processes_never_book_more_than_there_is(url: str) -> None:
    program = (
        "import threading\n"
        "from embedd_dagster.catalog.database import Catalog\n"
        "from embedd_dagster.catalog.provider_budgets import CatalogBudget\n"
        f"budget = CatalogBudget(Catalog({url!r}), {PROVIDER!r}, {{'requests': 60}})\n"
        "waits = []\n"
        "work = lambda: [waits.append(budget.acquire(1, 0)) for _ in range(10)]\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "print(len(waits))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert list(map(int, answers)) == [40, 40]
    # 80 requests at one a second; what the processes took to start and ask has been paid off meanwhile
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT level + extract(epoch FROM b.updated_at - p.created_at) FROM provider_budgets b"
            " JOIN embedding_providers p ON p.id = embedding_provider_id"
        ).fetchone()
    assert row is not None
    assert row[0] >= 80


def test_a_catalog_that_is_down_makes_wait_and_never_unlimited() -> None:
    catalog = Catalog("postgresql://nobody:none@127.0.0.1:1/none")
    budget = CatalogBudget(catalog, PROVIDER, {"requests": 60})
    for _ in range(3):
        with pytest.raises(EmbeddingRateLimited, match="catalog") as raised:
            budget.acquire(1, 1)
        assert raised.value.retry_after_seconds
    catalog.close()


def test_without_limits_there_is_no_budget(catalogs: list[Catalog]) -> None:
    assert CatalogBudget.from_limits(catalogs[0], PROVIDER, {}) is None
    assert CatalogBudget.from_limits(catalogs[0], PROVIDER, {"concurrency": 4, "tokens_per_minute": None}) is None
    assert CatalogBudget.from_limits(catalogs[0], PROVIDER, {"tokens_per_minute": 60}) is not None


def test_threads_share_one_lease(catalogs: list[Catalog]) -> None:
    budget = CatalogBudget(catalogs[0], PROVIDER, {"requests": 60})
    waits: list[float] = []
    threads = [threading.Thread(target=lambda: waits.append(budget.acquire(1, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == 8
    assert max(waits) > 5  # the eighth, at one a second
