"""Following a real log into real stores: changes in the source are found, also during other work."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from embedd_dagster.catalog import cdc, vector_tables
from embedd_dagster.catalog.tables import Task
from embedd_dagster.connectors.postgresql.source import PostgresSource
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.engine.cdc.tables import CdcTables
from embedd_dagster.errors import CatalogUnavailable
from tests.engine.conftest import COLUMNS, Product
from tests.support.cdc_product import (
    INSERT,
    ONE_STORE,
    Meanwhile,
    RunningConsumer,
    another_table,
    consumer_of,
    eventually,
    feed_of,
    is_resync_pending,
    is_subscribed,
    is_true,
    run_owed,
    settled,
    slots_of,
    under_a_sync,
)


def test_what_changes_is_found_at_once(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    before = product.provider.stats()["texts"]
    product.sql(
        """UPDATE products SET body = 'rewritten' WHERE id = 1;
        UPDATE products SET price = 999 WHERE id = 2;
        UPDATE products SET id = 9000 WHERE id = 3;
        DELETE FROM products WHERE id = 4;
        INSERT INTO products VALUES (1000, 'new', 'row', 'red', 1);
        INSERT INTO products VALUES (1001, NULL, ' ', 'red', 1)"""
    )
    eventually(lambda: sorted(product.points())[-2:] == [1000, 9000] and 4 not in product.points())
    eventually(lambda: _true_but(product, {1001}))
    # a changed key is a new row to us: its text is paid for again, as nothing tells that it was another's
    assert product.provider.stats()["texts"] - before <= 3
    assert not is_resync_pending(product)
    eventually(lambda: consumer.reports)
    assert consumer.reports[0].lag_seconds < 10


def _true_but(product: Product, without: set[int]) -> bool:
    product.assert_true_to_source(without=without)
    return True


@ONE_STORE
def test_it_is_known_until_when_a_followed_table_is_true(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed

    def fresh_as_of() -> Any:
        with product.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, product.vector_table_id)
            assert table is not None
            return cdc.fresh_as_of(table, cdc.find(session, table.connection_id))

    first = fresh_as_of()
    eventually(lambda: fresh_as_of() > first)


def test_nothing_is_lost_under_a_backfill_with_writers(cdc_product: Product) -> None:
    with consumer_of(cdc_product) as consumer:
        eventually(lambda: is_subscribed(cdc_product))
        cdc_product.provider.behave(latency_seconds=0.2)
        task_id = cdc_product.add_task()
        with Meanwhile(lambda: cdc_product.run_task(task_id)) as backfill:
            for n in range(60):
                cdc_product.sql(INSERT, 2000 + n)
                cdc_product.sql("UPDATE products SET body = %s WHERE id = %s", f"changed {n}", n + 1)
                cdc_product.sql("DELETE FROM products WHERE id = %s", 400 + n)
            cdc_product.provider.behave(latency_seconds=0)
        assert backfill.error is None
        eventually(lambda: settled(cdc_product))
        eventually(is_true(cdc_product))
    assert consumer.error is None


def test_what_is_live_follows_while_it_is_rebuilt_and_so_does_what_replaces_it(
    followed: tuple[Product, RunningConsumer],
) -> None:
    product, _consumer = followed
    product.reconfigure(columns=(COLUMNS[1], *COLUMNS[2:]))
    task_id = product.add_task(TaskType.REBACKFILL)
    product.provider.behave(latency_seconds=2)
    with Meanwhile(lambda: product.run_task(task_id)) as rebackfill:
        eventually(lambda: product.provider.stats()["in_flight"] > 0)
        product.sql(INSERT, 5000)  # the build has to embed it behind its own batches, so it is later
        eventually(lambda: 5000 in product.points())
        assert product.table().live_version == 1
        product.provider.behave(latency_seconds=0)
    assert rebackfill.error is None
    assert product.table().live_version == 2
    eventually(lambda: settled(product))
    eventually(is_true(product))


def test_nothing_is_written_under_a_sync_and_nothing_lost(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.sql("UPDATE products SET title = 'slow ' || id WHERE id <= 300")
    product.provider.behave(latency_seconds=0.3)
    task_id = product.add_task(TaskType.SYNC)
    with Meanwhile(lambda: product.run_task(task_id)) as sync:
        for n in range(40):
            product.sql("UPDATE products SET body = %s WHERE id = %s", f"under a sync {n}", n + 1)
        product.provider.behave(latency_seconds=0)
    assert sync.error is None
    eventually(lambda: settled(product))
    eventually(is_true(product))


@ONE_STORE
def test_a_paused_table_is_left_alone_and_compared_when_it_goes_on(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    _pause(product)
    product.sql(INSERT, 7000)
    eventually(lambda: consumer.reason is not None)
    assert slots_of(product) == [], "nothing is followed any more, so the source may forget"
    assert 7000 not in product.points()
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.resume(table)
    with consumer_of(product):
        eventually(lambda: is_subscribed(product))
        eventually(lambda: settled(product))
        assert 7000 in product.points()
        product.sql(INSERT, 7001)
        eventually(is_true(product))


def _pause(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.pause(table)


def test_a_truncated_table_is_emptied_without_a_confirmation(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.sql("TRUNCATE products")
    product.sql(INSERT, 1)
    eventually(lambda: is_resync_pending(product))
    eventually(lambda: settled(product))
    eventually(is_true(product))
    assert list(product.points()) == [1]


@ONE_STORE
def test_rows_deleted_one_by_one_need_no_confirmation_later(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.sql("DELETE FROM products WHERE id > 10")
    eventually(lambda: len(product.points()) == 10)
    assert product.run(TaskType.SYNC).rows_deleted == 0


def test_a_provider_that_is_down_delays_one_table_and_loses_nothing(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    product.provider.behave(fail_every=1, fail_status=503)
    product.sql(INSERT, 8000)
    eventually(lambda: is_resync_pending(product))
    assert product.table().last_error
    assert product.table().sync_status == SyncStatus.SYNCED
    product.sql(INSERT, 8001)
    time.sleep(0.5)
    product.provider.behave(fail_every=0)
    eventually(lambda: settled(product))
    eventually(is_true(product))
    assert product.table().last_error is None
    product.sql(INSERT, 8002)
    eventually(is_true(product))
    assert consumer.error is None


@ONE_STORE
def test_a_huge_transaction_is_followed_in_bounded_memory(cdc_product: Product) -> None:
    cdc_product.run()
    with consumer_of(cdc_product) as consumer:
        eventually(lambda: is_subscribed(cdc_product) and settled(cdc_product))
        cdc_product.sql("INSERT INTO products SELECT n, 'bulk', 'load', 'red', 1 FROM generate_series(10000, 59999) n")
        eventually(lambda: len(cdc_product.points()) == 50_500, within=120)
        consumer.stop()
    cdc_product.assert_true_to_source()


@ONE_STORE
def test_a_writer_that_never_stops_does_not_owe_sync_after_sync(cdc_product: Product) -> None:
    cdc_product.provider.behave(latency_seconds=0.05)
    stop, syncs = threading.Event(), 0

    def write_on() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            cdc_product.sql("UPDATE products SET body = %s WHERE id = %s", f"version {n}", n % 400 + 1)

    with consumer_of(cdc_product) as consumer, Meanwhile(write_on) as writer:
        try:
            cdc_product.run()
            eventually(lambda: is_subscribed(cdc_product) and is_resync_pending(cdc_product))
            for _ in range(8):
                syncs += run_owed(cdc_product)
                time.sleep(0.1)
            assert 1 <= syncs <= 2
            cdc_product.sql(INSERT, 9500)
            eventually(lambda: 9500 in cdc_product.points())
        finally:
            stop.set()
    assert (writer.error, consumer.error) == (None, None)


@ONE_STORE
@pytest.mark.parametrize("method", ["_write", "_complete_buffered"])
def test_what_was_noted_outlives_an_outage(
    followed: tuple[Product, RunningConsumer], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    product, consumer = followed
    failed, real = [], getattr(CdcTables, method)

    def down_once(*parameters: Any) -> Any:
        if not failed:
            failed.append(parameters)
            raise CatalogUnavailable("down")
        return real(*parameters)

    with under_a_sync(product):
        product.sql(INSERT, 9600)
        eventually(lambda: product.table().cdc.changes_pending == 1)
        monkeypatch.setattr(CdcTables, method, down_once)
    eventually(lambda: failed and not is_resync_pending(product))
    assert 9600 in product.points()
    assert product.table().cdc.changes_pending == 0
    assert consumer.error is None


@ONE_STORE
def test_a_locked_table_does_not_hold_up_the_others(
    followed: tuple[Product, RunningConsumer], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, consumer = followed
    other = another_table(product, "goods")
    other.run()
    eventually(lambda: is_subscribed(other) and settled(other))
    consumer.stop()
    monkeypatch.setattr(PostgresSource, "lock_timeout_seconds", 0.2)
    product.sql(INSERT, 9700)
    with psycopg.connect(product.database_url) as locker:
        locker.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        with consumer_of(product):
            eventually(lambda: is_resync_pending(product), within=15)
            assert "lock" in (product.table().last_error or "")
            before = feed_of(product)
            assert before is not None
            product.sql("INSERT INTO goods VALUES (1, 'next to', 'it', 'red', 1)")
            eventually(is_true(other))
            eventually(lambda: (feed_of(product) or before).position != before.position)
            locker.rollback()
            eventually(lambda: settled(product))
            eventually(is_true(product))


@ONE_STORE
def test_what_could_not_be_applied_is_owed_and_no_longer_pending(followed: tuple[Product, RunningConsumer]) -> None:
    product, _consumer = followed
    product.provider.behave(fail_every=1, fail_status=503)
    with under_a_sync(product):
        product.sql(INSERT, 9800)
        eventually(lambda: product.table().cdc.changes_pending == 1)
        held_by = product.table().cdc.buffered_by_run_id
    eventually(lambda: held_by and product.table().cdc.buffered_by_run_id is None)
    assert is_resync_pending(product)
    assert product.table().cdc.changes_pending == 0
    product.provider.behave(fail_every=0)
    eventually(lambda: settled(product))
    eventually(is_true(product))


@ONE_STORE
def test_a_sync_of_a_machine_whose_clock_is_behind_is_seen(
    cdc_product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that the API made, a minute ahead, must not hide the one that the daemon makes after it."""
    product = cdc_product
    product.run()
    with consumer_of(product):
        eventually(lambda: is_subscribed(product) and settled(product))
    with product.runtime.catalog.transaction() as session:
        for task in session.scalars(select(Task)):
            task.created_at += timedelta(minutes=1)
    product.sql("UPDATE products SET body = 'rewritten ' || id WHERE id <= 20")
    sync = product.add_task(TaskType.SYNC)
    with product.caught(sync) as running:
        product.sql("DELETE FROM products WHERE id <= 20")
        with consumer_of(product):
            eventually(lambda: product.table().cdc.changes_pending >= 20)
            product.provider.behave(held=False)
            running.result(60)
            eventually(lambda: settled(product) and product.table().cdc.changes_pending == 0)
    product.assert_true_to_source()
