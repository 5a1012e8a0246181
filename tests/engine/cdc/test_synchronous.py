"""A consumer of a source whose commits wait for a synchronous standby, which is a real `pg_receivewal`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.source import PostgresSource
from embedd_dagster.core.status import SyncStatus
from tests.engine.conftest import Product
from tests.support.cdc_product import (
    INSERT,
    ONE_STORE,
    RunningConsumer,
    eventually,
    feed_of,
    is_resync_pending,
    is_true,
)
from tests.support.synchronous_standby import WAITS, SynchronousStandby


def _commit(product: Product, key: int) -> None:
    """One transaction, whose commit waits for the standby: a new row, and a changed one."""
    with psycopg.connect(product.database_url, autocommit=True) as connection:
        connection.execute(WAITS)
        with connection.transaction():
            connection.execute(INSERT, [key])
            connection.execute("UPDATE products SET title = 'changed' WHERE id = %s", [key - 7000])


def _waiting_commits(product: Product) -> int:
    statement = """SELECT count(*) FROM pg_stat_activity
        WHERE wait_event = 'SyncRep' AND datname = current_database()"""
    return int(product.sql(statement)[0][0])


def _decoded(product: Product) -> int:
    """How many transactions the consumer's slot has given."""
    statement = """SELECT coalesce(sum(total_txns), 0) FROM pg_stat_replication_slots
        JOIN pg_replication_slots USING (slot_name) WHERE database = current_database()"""
    return int(product.sql(statement)[0][0])


@ONE_STORE
def test_no_committed_row_is_lost_while_commits_wait_for_a_standby(
    followed: tuple[Product, RunningConsumer], standby: SynchronousStandby, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresSource, "stream_options", StreamOptions(visible_seconds=0.3))
    product, _consumer = followed
    before = len(product.points())
    with ThreadPoolExecutor(4) as pool:
        for cycle in range(5):
            standby.stop()
            decoded = _decoded(product)
            writing = [pool.submit(_commit, product, 7001 + 4 * cycle + index) for index in range(4)]
            eventually(lambda: _waiting_commits(product) == 4)
            eventually(lambda decoded=decoded: _decoded(product) >= decoded + 4)  # type: ignore[misc]
            standby.go_on()
            for one in writing:
                one.result(60)
    eventually(is_true(product), within=30)
    assert len(product.points()) == before + 20
    assert not is_resync_pending(product)


@ONE_STORE
def test_a_consumer_says_that_it_waits_for_a_standby_and_goes_on_when_it_is_back(
    followed: tuple[Product, RunningConsumer], standby: SynchronousStandby, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresSource, "stream_options", StreamOptions(visible_seconds=0.1))
    product, _consumer = followed
    standby.stop()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_commit, product, 7001)

        def is_told() -> bool:
            feed = feed_of(product)
            return feed is not None and "synchronous standby" in (feed.last_error or "")

        eventually(is_told)
        assert product.table().sync_status == SyncStatus.SYNCED
        assert 7001 not in product.points()
        standby.go_on()
        writing.result(60)
    eventually(is_true(product))
    eventually(lambda: not is_told())
