"""Following a real log into real stores: what changes in the source is found, whatever else is going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from embedd_dagster.catalog import change_feeds, connections, environments, resyncs, tasks, vector_tables
from embedd_dagster.catalog.tables import ChangeFeed
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Mode, SyncMode
from embedd_dagster.engine import follow
from embedd_dagster.engine.followed_tables import FollowedTables
from embedd_dagster.engine.teardown import drop_unused_feeds, teardown
from embedd_dagster.errors import CatalogUnavailable, Conflict, SourceRejected, SourceUnavailable
from embedd_dagster.sources import postgresql_connections
from tests.engine.conftest import COLUMNS, Product
from tests.support.following import RunningFollower, eventually

ONE_STORE = pytest.mark.parametrize("product", [Mode.PLATFORM], indirect=True, ids=["pgvector"])
"""Of what has nothing to do with stores."""
INSERT = "INSERT INTO products VALUES (%s, 'new', 'row', 'red', 1)"


@pytest.fixture
def product(product: Product) -> Iterator[Product]:
    """A cdc table, nothing built yet."""
    _make_cdc(product)
    product.runtime.settings.__dict__.update(follow_poll_seconds=0.05, follow_patience_seconds=1.5)
    yield product
    product.sql(
        """SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots
           WHERE database = current_database() AND active_pid IS NOT NULL"""
    )
    eventually(lambda: not _slots(product) or _drop_slots(product))


def _make_cdc(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        table.sync_mode = SyncMode.CDC.value


def _drop_slots(product: Product) -> bool:
    product.sql(
        """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
           WHERE database = current_database() AND NOT active"""
    )
    return not _slots(product)


def _slots(product: Product) -> list[tuple[Any, ...]]:
    return product.sql("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")


def _follower(product: Product) -> RunningFollower:
    return RunningFollower(product.runtime, product.table().connection_id)


def _feed(product: Product) -> ChangeFeed | None:
    with product.runtime.catalog.transaction() as session:
        return change_feeds.find(session, product.table().connection_id)


def _is_true(product: Product) -> Callable[[], bool]:
    def holds() -> bool:
        product.assert_true_to_source()
        return True

    return holds


def _is_followed(product: Product) -> bool:
    return product.table().followed_since is not None


def _run_owed(product: Product) -> int:
    """Runs the syncs that are owed, as the reconcile sensor would; how many."""
    with product.runtime.catalog.transaction() as session:
        owed = resyncs.owed(session, 10)
    for one in owed:
        product.run(TaskType.SYNC, **one.options, reason=one.reason)
    return len(owed)


def _is_owed(product: Product) -> bool:
    table = product.table()
    return table.resync_wanted > table.resync_done


def _settled(product: Product) -> bool:
    """Nothing is owed any more; what a sync has to do is done here."""
    _run_owed(product)
    return not _is_owed(product)


@pytest.fixture
def followed(product: Product) -> Iterator[tuple[Product, RunningFollower]]:
    """A built table that is followed, with nothing owed."""
    product.run()
    with _follower(product) as follower:
        eventually(lambda: _is_followed(product) and _settled(product))
        yield product, follower


def test_what_changes_is_found_at_once(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
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
    assert not _is_owed(product)
    eventually(lambda: follower.reports)
    assert follower.reports[0].lag_seconds < 10


def _true_but(product: Product, without: set[int]) -> bool:
    product.assert_true_to_source(without=without)
    return True


@ONE_STORE
def test_it_is_known_until_when_a_followed_table_is_true(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed

    def true_until() -> Any:
        with product.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, product.vector_table_id)
            assert table is not None
            return change_feeds.true_until(table, change_feeds.find(session, table.connection_id))

    first = true_until()
    eventually(lambda: true_until() > first)


def test_nothing_is_lost_under_a_backfill_with_writers(product: Product) -> None:
    with _follower(product) as follower:
        eventually(lambda: _is_followed(product))
        product.provider.behave(latency_seconds=0.2)
        task_id = product.add_task()
        with _thread(lambda: product.run_task(task_id)) as backfill:
            for n in range(60):
                product.sql(INSERT, 2000 + n)
                product.sql("UPDATE products SET body = %s WHERE id = %s", f"changed {n}", n + 1)
                product.sql("DELETE FROM products WHERE id = %s", 400 + n)
            product.provider.behave(latency_seconds=0)
        assert backfill.error is None
        eventually(lambda: _settled(product))
        eventually(_is_true(product))
    assert follower.error is None


def test_what_is_live_follows_while_it_is_rebuilt_and_so_does_what_replaces_it(
    followed: tuple[Product, RunningFollower],
) -> None:
    product, _follower = followed
    product.reconfigure(columns=(COLUMNS[1], *COLUMNS[2:]))
    task_id = product.add_task(TaskType.REBACKFILL)
    product.provider.behave(latency_seconds=2)
    with _thread(lambda: product.run_task(task_id)) as rebackfill:
        eventually(lambda: product.provider.stats()["in_flight"] > 0)
        product.sql(INSERT, 5000)  # the build has to embed it behind its own batches, so it is later
        eventually(lambda: 5000 in product.points())
        assert product.table().live_version == 1
        product.provider.behave(latency_seconds=0)
    assert rebackfill.error is None
    assert product.table().live_version == 2
    eventually(lambda: _settled(product))
    eventually(_is_true(product))


def test_nothing_is_written_under_a_sync_and_nothing_lost(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.sql("UPDATE products SET title = 'slow ' || id WHERE id <= 300")
    product.provider.behave(latency_seconds=0.3)
    task_id = product.add_task(TaskType.SYNC)
    with _thread(lambda: product.run_task(task_id)) as sync:
        for n in range(40):
            product.sql("UPDATE products SET body = %s WHERE id = %s", f"under a sync {n}", n + 1)
        product.provider.behave(latency_seconds=0)
    assert sync.error is None
    eventually(lambda: _settled(product))
    eventually(_is_true(product))


@ONE_STORE
def test_a_paused_table_is_left_alone_and_compared_when_it_goes_on(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    _pause(product)
    product.sql(INSERT, 7000)
    eventually(lambda: follower.reason is not None)
    assert _slots(product) == [], "nothing is followed any more, so the source may forget"
    assert 7000 not in product.points()
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.resume(session, table)
    with _follower(product):
        eventually(lambda: _is_followed(product))
        eventually(lambda: _settled(product))
        assert 7000 in product.points()
        product.sql(INSERT, 7001)
        eventually(_is_true(product))


def _pause(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.pause(session, table)


def test_a_truncated_table_is_emptied_without_a_confirmation(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.sql("TRUNCATE products")
    product.sql(INSERT, 1)
    eventually(lambda: _is_owed(product))
    eventually(lambda: _settled(product))
    eventually(_is_true(product))
    assert list(product.points()) == [1]


@ONE_STORE
def test_rows_deleted_one_by_one_need_no_confirmation_later(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.sql("DELETE FROM products WHERE id > 10")
    eventually(lambda: len(product.points()) == 10)
    assert product.run(TaskType.SYNC).rows_deleted == 0


def test_a_provider_that_is_down_delays_one_table_and_loses_nothing(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    product.provider.behave(fail_every=1, fail_status=503)
    product.sql(INSERT, 8000)
    eventually(lambda: _is_owed(product))
    assert product.table().last_error
    assert product.table().sync_status == SyncStatus.SYNCED
    product.sql(INSERT, 8001)
    time.sleep(0.5)
    product.provider.behave(fail_every=0)
    eventually(lambda: _settled(product))
    eventually(_is_true(product))
    assert product.table().last_error is None
    product.sql(INSERT, 8002)
    eventually(_is_true(product))
    assert follower.error is None


@ONE_STORE
def test_a_configured_column_that_is_dropped_is_named(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.sql("ALTER TABLE products ADD COLUMN note text DEFAULT 'x'; ALTER TABLE products DROP COLUMN note")
    product.sql(INSERT, 6000)
    eventually(_is_true(product))
    product.sql("ALTER TABLE products DROP COLUMN body")
    product.sql("UPDATE products SET price = 5 WHERE id = 1")
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert "'body'" in (product.table().last_error or "")
    assert product.search("product 1"), "what is live stays live"
    product.sql("ALTER TABLE products ADD COLUMN body text")
    eventually(lambda: _settled(product))
    assert product.table().sync_status == SyncStatus.SYNCED
    eventually(_is_true(product))


@ONE_STORE
@pytest.mark.parametrize("statement", ["ALTER TABLE products RENAME TO goods", "DROP TABLE products"])
def test_a_table_that_is_renamed_or_dropped_is_an_error_that_says_so(
    followed: tuple[Product, RunningFollower], statement: str
) -> None:
    product, follower = followed
    count = len(product.points())
    product.sql(statement)
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    assert "products" in (product.table().last_error or "")
    assert len(product.points()) == count
    assert follower.reason is None
    assert follower.error is None


@ONE_STORE
def test_a_table_that_comes_back_is_followed_again(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.sql("ALTER TABLE products RENAME TO goods")
    product.sql("UPDATE goods SET title = 'elsewhere' WHERE id = 1")
    eventually(lambda: product.table().sync_status == SyncStatus.ERROR)
    product.sql("ALTER TABLE goods RENAME TO products")
    eventually(lambda: _is_followed(product) and _settled(product))
    assert product.table().sync_status == SyncStatus.SYNCED
    product.sql(INSERT, 6001)
    eventually(_is_true(product))


@ONE_STORE
def test_a_lost_slot_is_made_anew_and_everything_compared(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed

    def dropped() -> bool:
        product.sql(
            """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
               WHERE database = current_database() AND NOT active"""
        )
        return True

    eventually(_retried(dropped))
    product.sql(INSERT, 6100)
    eventually(lambda: _is_owed(product))
    eventually(lambda: _settled(product))
    eventually(_is_true(product))
    assert _slots(product)
    product.sql(INSERT, 6101)
    eventually(_is_true(product))
    assert any("Following" in line for line in follower.log)


def _retried(action: Callable[[], bool]) -> Callable[[], bool]:
    def attempt() -> bool:
        try:
            return action()
        except Exception:
            return False

    return attempt


@ONE_STORE
def test_the_last_table_takes_slot_and_publication_with_it(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        connection_id = table.connection_id
        vector_tables.mark_deleted(table)
    eventually(lambda: follower.reason is not None)
    assert _slots(product) == []
    assert product.sql("SELECT pubname FROM pg_publication") == []
    assert teardown(product.runtime, product.vector_table_id)
    with product.runtime.catalog.transaction() as session:
        assert change_feeds.find(session, connection_id) is None
        connections.delete(session, product.environment_id, connection_id)


@ONE_STORE
def test_a_connection_is_not_deleted_from_under_its_slot(followed: tuple[Product, RunningFollower]) -> None:
    """While it cannot be dropped, somebody must say that it may be left behind."""
    product, follower = followed
    connection = product.connection()
    follower.stop()
    with product.runtime.catalog.transaction() as session:
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
    assert teardown(product.runtime, product.vector_table_id)
    ((slot,),) = _slots(product)
    port = connection.settings["port"]
    _lead_to_port(product, connection.id, 1)
    with pytest.raises(SourceUnavailable):
        drop_unused_feeds(product.runtime)
    with pytest.raises(Conflict, match="still to be removed") as refused:
        _delete_connection(product, connection.id)
    assert "127.0.0.1:1" in refused.value.message
    assert f"pg_drop_replication_slot('{slot}')" in refused.value.resolution
    _lead_to_port(product, connection.id, port)
    assert drop_unused_feeds(product.runtime) == 1
    assert _slots(product) == []
    _delete_connection(product, connection.id)


@ONE_STORE
def test_a_connection_is_deleted_by_force_with_its_database_gone(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    connection = product.connection()
    follower.stop()
    with product.runtime.catalog.transaction() as session:
        vector_tables.mark_deleted(
            vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        )
    assert teardown(product.runtime, product.vector_table_id)
    _delete_connection(product, connection.id, force=True)
    with product.runtime.catalog.transaction() as session:
        assert connections.find(session, connection.id) is None
        assert change_feeds.find(session, connection.id) is None


def _delete_connection(product: Product, connection_id: str, *, force: bool = False) -> None:
    with product.runtime.catalog.transaction() as session:
        connections.delete(session, product.environment_id, connection_id, force=force)


def _lead_to_port(product: Product, connection_id: str, port: int) -> None:
    with product.runtime.catalog.transaction() as session:
        connection = connections.get(session, product.environment_id, connection_id, lock=True)
        connection.settings = {**connection.settings, "port": port}


@ONE_STORE
def test_what_a_dead_follower_left_is_dropped_without_one(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    follower.stop()
    assert _slots(product)
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        vector_tables.mark_deleted(table)
    assert drop_unused_feeds(product.runtime) == 1
    assert drop_unused_feeds(product.runtime) == 0
    assert _slots(product) == []


@ONE_STORE
def test_a_second_follower_ends_at_once_and_a_successor_takes_over(followed: tuple[Product, RunningFollower]) -> None:
    product, first = followed
    with _follower(product) as second:
        second.join()
    assert first.run_id in (second.reason or "")
    assert first.reason is None
    product.runtime.settings.__dict__.update(follow_renew_seconds=0.01)
    with _follower(product) as successor:
        eventually(lambda: first.reason is not None)
        product.sql(INSERT, 6200)
        eventually(_is_true(product))
        assert successor.reason is None


@ONE_STORE
def test_a_stopped_follower_goes_on_where_it_was(followed: tuple[Product, RunningFollower]) -> None:
    product, first = followed
    first.stop()
    product.sql(INSERT, 6300)
    with _follower(product) as second:
        eventually(_is_true(product))
        assert not _is_owed(product)
    assert second.error is None


@ONE_STORE
def test_a_log_that_grows_too_long_is_given_up_by_setting(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    follower.stop()
    product.sql("CREATE TABLE filler AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 20000) n")
    product.provider.behave(fail_every=1, fail_status=503)
    product.sql(INSERT, 6400)
    product.runtime.settings.__dict__.update(
        cdc_max_lag_bytes=1_000_000, cdc_drop_above_max_lag=True, follow_patience_seconds=30
    )
    with _follower(product):
        eventually(lambda: _is_owed(product))
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=0)
        assert "of its log" in (product.table().last_error or "")
        product.provider.behave(fail_every=0)
        eventually(lambda: _is_followed(product) and _settled(product))
        eventually(_is_true(product))


@ONE_STORE
def test_a_database_that_cannot_be_followed_any_more_is_told_by_its_tables(
    followed: tuple[Product, RunningFollower],
) -> None:
    product, follower = followed
    follower.stop()
    role = f"reader_{uuid4().hex[:8]}"  # of the whole server
    product.sql(
        f"""CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON products TO {role};
        GRANT ALL ON SCHEMA public TO {role}"""
    )
    good = _use(product, user=role, password="x")
    with _follower(product) as refused:
        refused.join()
        error, refused.error = refused.error, None
    assert isinstance(error, SourceRejected)
    assert "REPLICATION" in error.resolution
    assert product.table().sync_status == SyncStatus.ERROR
    assert "REPLICATION" in (product.table().last_error or "")
    product.sql(INSERT, 6500)
    _use(product, **good)
    with _follower(product):
        eventually(lambda: _is_followed(product) and _settled(product))
        assert product.table().sync_status == SyncStatus.SYNCED
        eventually(_is_true(product))
    product.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def _use(product: Product, **changes: Any) -> dict[str, Any]:
    """Changes the connection's credentials; those before."""
    with product.runtime.catalog.transaction() as session:
        connection = connections.find(session, product.table().connection_id)
        assert connection is not None
        before = connections.open_credentials(connection, product.runtime.box)
        connections.set_credentials(connection, product.runtime.box, {**before, **changes})
        connections.record_test(connection, None)
        return before


@ONE_STORE
def test_a_huge_transaction_is_followed_in_bounded_memory(product: Product) -> None:
    product.run()
    with _follower(product) as follower:
        eventually(lambda: _is_followed(product) and _settled(product))
        product.sql("INSERT INTO products SELECT n, 'bulk', 'load', 'red', 1 FROM generate_series(10000, 59999) n")
        eventually(lambda: len(product.points()) == 50_500, within=120)
        follower.stop()
    product.assert_true_to_source()


class _thread:
    """Runs something meanwhile, and waits for it at the end."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> _thread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@ONE_STORE
def test_a_writer_that_never_stops_does_not_owe_sync_after_sync(product: Product) -> None:
    product.provider.behave(latency_seconds=0.05)
    stop, syncs = threading.Event(), 0

    def write_on() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            product.sql("UPDATE products SET body = %s WHERE id = %s", f"version {n}", n % 400 + 1)

    with _follower(product) as follower, _thread(write_on) as writer:
        try:
            product.run()
            eventually(lambda: _is_followed(product) and _is_owed(product))
            for _ in range(8):
                syncs += _run_owed(product)
                time.sleep(0.1)
            assert 1 <= syncs <= 2
            product.sql(INSERT, 9500)
            eventually(lambda: 9500 in product.points())
        finally:
            stop.set()
    assert (writer.error, follower.error) == (None, None)


@contextmanager
def _under_a_sync(product: Product) -> Iterator[None]:
    """A sync is at work, and does nothing; completed at the end."""
    task_id = product.add_task(TaskType.SYNC)
    with product.runtime.catalog.transaction() as session:
        tasks.claim(session, task_id, "run of the sync")
    yield
    with product.runtime.catalog.transaction() as session:
        tasks.complete(session, task_id, "run of the sync", tasks.EMPTY_PROGRESS)


@ONE_STORE
@pytest.mark.parametrize("method", ["_write", "_settle"])
def test_what_was_noted_outlives_an_outage(
    followed: tuple[Product, RunningFollower], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    product, follower = followed
    failed, real = [], getattr(FollowedTables, method)

    def down_once(*parameters: Any) -> Any:
        if not failed:
            failed.append(parameters)
            raise CatalogUnavailable("down")
        return real(*parameters)

    with _under_a_sync(product):
        product.sql(INSERT, 9600)
        eventually(lambda: product.table().changes_pending == 1)
        monkeypatch.setattr(FollowedTables, method, down_once)
    eventually(lambda: failed and not _is_owed(product))
    assert 9600 in product.points()
    assert product.table().changes_pending == 0
    assert follower.error is None


def _another(product: Product, source_table: str) -> Product:
    """A second cdc table of the same connection, nothing built yet."""
    product.sql(f"CREATE TABLE {source_table} (LIKE products INCLUDING ALL)")
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id)
        assert table is not None
        configuration = replace(table.configuration, source_table=source_table)
        environment = environments.get(session, table.org_id, table.environment_id)
        new = NewVectorTable(
            source_table, table.connection_id, configuration, product.mode, SyncMode.CDC, platform_schema="public"
        )
        return replace(product, vector_table_id=vector_tables.create(session, environment, new).id)


@ONE_STORE
def test_a_table_that_waits_for_a_transaction_says_so(
    followed: tuple[Product, RunningFollower], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot join the log while somebody who has written to it may yet commit; the others go on."""
    monkeypatch.setattr(follow, "_HELD_OUT_SECONDS", 0.5)
    monkeypatch.setattr(follow, "_ATTACH_SECONDS", 0.2)
    product, follower = followed
    held = _another(product, "held")
    with psycopg.connect(product.database_url) as writer:
        writer.execute("INSERT INTO held VALUES (1, 'written', 'and not committed', 'red', 1)")
        eventually(lambda: "is open for long" in (held.table().last_error or ""))
        assert held.table().followed_since is None
        product.sql(INSERT, 9700)
        eventually(lambda: 9700 in product.points())
    eventually(lambda: _is_followed(held))
    held.run()
    assert held.table().last_error is None
    assert list(held.points()) == [1]
    assert follower.error is None


@ONE_STORE
def test_a_locked_table_does_not_hold_up_the_others(
    followed: tuple[Product, RunningFollower], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, follower = followed
    other = _another(product, "goods")
    other.run()
    eventually(lambda: _is_followed(other) and _settled(other))
    follower.stop()
    monkeypatch.setitem(postgresql_connections._SESSION, "lock_timeout", "200ms")
    product.sql(INSERT, 9700)
    with psycopg.connect(product.database_url) as locker:
        locker.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        with _follower(product):
            eventually(lambda: _is_owed(product), within=15)
            assert "lock" in (product.table().last_error or "")
            before = _feed(product)
            assert before is not None
            product.sql("INSERT INTO goods VALUES (1, 'beside', 'it', 'red', 1)")
            eventually(_is_true(other))
            eventually(lambda: (_feed(product) or before).position != before.position)
            locker.rollback()
            eventually(lambda: _settled(product))
            eventually(_is_true(product))


@ONE_STORE
def test_what_could_not_be_applied_is_owed_and_no_longer_pending(followed: tuple[Product, RunningFollower]) -> None:
    product, _follower = followed
    product.provider.behave(fail_every=1, fail_status=503)
    with _under_a_sync(product):
        product.sql(INSERT, 9800)
        eventually(lambda: product.table().changes_pending == 1)
        held_by = product.table().resync_held_by
    eventually(lambda: held_by and product.table().resync_held_by is None)
    assert _is_owed(product)
    assert product.table().changes_pending == 0
    product.provider.behave(fail_every=0)
    eventually(lambda: _settled(product))
    eventually(_is_true(product))


@ONE_STORE
def test_a_log_that_gets_too_long_while_changes_are_gathered_is_given_up(
    followed: tuple[Product, RunningFollower],
) -> None:
    product, follower = followed
    follower.stop()
    product.runtime.settings.__dict__.update(follow_poll_seconds=60, heartbeat_seconds=0.2)
    with _follower(product) as gathering:
        eventually(lambda: gathering.log or (_feed(product) or ChangeFeed()).lag_bytes is not None)
        product.sql("CREATE TABLE filler AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 20000) n")
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=1_000_000, cdc_drop_above_max_lag=True)
        eventually(lambda: _is_owed(product))
        product.runtime.settings.__dict__.update(cdc_max_lag_bytes=0)
        assert "of its log" in (product.table().last_error or "")
        assert gathering.error is None


@ONE_STORE
def test_a_table_that_joined_is_compared_also_where_that_could_not_be_recorded_at_once(
    followed: tuple[Product, RunningFollower], monkeypatch: pytest.MonkeyPatch
) -> None:
    product, _follower = followed
    original, away = change_feeds.set_followed, iter([True])

    def set_followed(session: Any, connection_id: str, kept: Any, joined: Any) -> Any:
        if joined and next(away, False):
            raise CatalogUnavailable("The catalog database does not answer.")
        return original(session, connection_id, kept, joined)

    monkeypatch.setattr(change_feeds, "set_followed", set_followed)
    publication = product.sql("SELECT pubname FROM pg_publication")[0][0]
    product.sql(f'ALTER PUBLICATION "{publication}" DROP TABLE products')
    product.sql(INSERT, 9900)
    eventually(lambda: _is_owed(product))
    eventually(lambda: _settled(product))
    eventually(_is_true(product))
    assert next(away, None) is None


@ONE_STORE
def test_a_connection_that_leads_elsewhere_leaves_no_slot_behind(followed: tuple[Product, RunningFollower]) -> None:
    product, follower = followed
    assert _slots(product)
    _use(product, host="localhost")
    follower.join()
    assert "was changed" in (follower.reason or "")
    assert _slots(product) == []
