"""Following a real PostgreSQL: what a feed gives of every kind of change, and what becomes of it when others interfere."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.core.keys import encode_key
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.errors import (
    ChangeFeedLost,
    EmbeddError,
    SourceRejected,
    SourceTableNotFound,
    SourceUnavailable,
)
from embedd_dagster.local.postgres import EmbeddedPostgres, open_temporary_postgres
from embedd_dagster.sources import open_source
from embedd_dagster.sources.base import Selection, Source
from embedd_dagster.sources.changes import Attachment, ChangeBatch, ChangeFeed, FollowedTable

Admin = psycopg.Connection[Any]
T = FollowedTable("t", "id")


def credentials_of(url: str, **changes: Any) -> dict[str, Any]:
    parts = conninfo_to_dict(url)
    return {
        "host": parts["host"],
        "port": int(str(parts["port"])),
        "database": parts["dbname"],
        "user": parts["user"],
        "password": parts["password"],
        **changes,
    }


@pytest.fixture
def admin(database_url: str) -> Iterator[Admin]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def writer(database_url: str) -> Iterator[Admin]:
    """Another session, for transactions that stay open."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def source(database_url: str) -> Iterator[Source]:
    with open_source("postgresql", credentials_of(database_url)) as opened:
        yield opened


@pytest.fixture
def name() -> str:
    return f"embedd_{uuid4().hex[:8]}"


@pytest.fixture
def feed(source: Source, name: str) -> Iterator[ChangeFeed]:
    with source.change_feed(name) as opened:
        yield opened


@pytest.fixture
def table(admin: Admin) -> None:
    """`t`, with rows 1 to 3."""
    admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    admin.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3) g")


class Follower:
    """A feed with the position that a consumer keeps."""

    def __init__(self, feed: ChangeFeed, *tables: FollowedTable) -> None:
        self.feed = feed
        self.tables = tables
        self.position: int | None = None

    def attach(self) -> Attachment:
        attachment = self.feed.attach(self.tables, self.position)
        if self.position is None or attachment.lost:
            self.position = attachment.position
        return attachment

    def read(self, *, max_keys: int = 1000, confirm: bool = True) -> list[ChangeBatch]:
        batches = list(self.feed.read(max_keys=max_keys))
        assert batches[-1].position is not None
        if confirm:
            self.position = batches[-1].position
            self.feed.confirm(self.position)
        return batches

    def keys(self, table: FollowedTable = T) -> list[Any]:
        batches = self.read()
        assert not any(batch.broken or batch.truncated for batch in batches)
        assert all(other in (*self.tables, table) for batch in batches for other in batch.keys)
        return [key for batch in batches for key in batch.keys.get(table, [])]


@pytest.fixture
def follower(feed: ChangeFeed, table: None) -> Follower:
    """Of `t`, attached, with nothing to read."""
    made = Follower(feed, T)
    attachment = made.attach()
    assert attachment.joined == {T}
    assert not attachment.refused
    assert attachment.lost is None
    return made


def one(connection: Admin, statement: str, *parameters: Any) -> Any:
    row = connection.execute(statement, parameters).fetchone()
    return row[0] if row else None


def published(admin: Admin, name: str) -> set[str]:
    rows = admin.execute("SELECT tablename FROM pg_publication_tables WHERE pubname = %s", [name]).fetchall()
    return {row[0] for row in rows}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def statements_of(error: EmbeddError) -> str:
    return error.resolution.partition("administrator: ")[2]


class TestChanges:
    def test_insert_update_delete(self, admin: Admin, follower: Follower) -> None:
        admin.execute("INSERT INTO t VALUES (4, 'y')")
        assert follower.keys() == [4]
        admin.execute("UPDATE t SET v = 'z' WHERE id = 2")
        assert follower.keys() == [2]
        admin.execute("DELETE FROM t WHERE id = 1")
        assert follower.keys() == [1]
        assert follower.keys() == []

    def test_a_changed_key_gives_the_old_and_the_new(self, admin: Admin, follower: Follower) -> None:
        admin.execute("UPDATE t SET id = 30 WHERE id = 3")
        assert follower.keys() == [3, 30]

    def test_a_batch_says_how_many_changes_of_when(self, admin: Admin, follower: Follower) -> None:
        before = datetime.now(UTC)
        admin.execute("UPDATE t SET v = 'a'")
        between = datetime.now(UTC)
        admin.execute("UPDATE t SET v = 'b'")
        (batch,) = follower.read()
        assert batch.keys == {T: [1, 2, 3]}
        assert batch.change_count == 6
        assert batch.committed_at is not None
        assert before <= batch.committed_at <= between
        (batch,) = follower.read()
        assert (batch.keys, batch.change_count, batch.committed_at) == ({}, 0, None)

    def test_order_is_that_of_commits(self, admin: Admin, writer: Admin, follower: Follower) -> None:
        writer.execute("BEGIN; INSERT INTO t VALUES (10)")
        admin.execute("INSERT INTO t VALUES (11)")
        writer.execute("COMMIT")
        assert follower.keys() == [11, 10]

    def test_truncate(self, admin: Admin, follower: Follower) -> None:
        admin.execute("INSERT INTO t VALUES (9); TRUNCATE t; INSERT INTO t VALUES (1)")
        (batch,) = follower.read()
        assert batch.truncated == {T}
        assert batch.keys == {T: [9, 1]}
        assert batch.change_count == 3
        # The log cannot tell it from a table that was written anew: it joins again, which a comparison settles.
        assert follower.attach().joined == {T}
        assert follower.attach().joined == set()

    def test_truncate_cascade_names_every_table(self, admin: Admin, feed: ChangeFeed, table: None) -> None:
        admin.execute("CREATE TABLE child (id int PRIMARY KEY, t_id int REFERENCES t); CREATE TABLE other (id int)")
        child = FollowedTable("child", "id")
        follower = Follower(feed, T, child)
        follower.attach()
        admin.execute("TRUNCATE t CASCADE")
        (batch,) = follower.read()
        assert batch.truncated == {T, child}

    def test_rolled_back_transactions_and_savepoints(self, admin: Admin, follower: Follower) -> None:
        admin.execute("BEGIN; INSERT INTO t VALUES (10); ROLLBACK")
        admin.execute(
            "BEGIN; INSERT INTO t VALUES (11); SAVEPOINT s; INSERT INTO t VALUES (12); ROLLBACK TO s;"
            "SAVEPOINT s2; INSERT INTO t VALUES (13); RELEASE s2; COMMIT"
        )
        assert follower.keys() == [11, 13]

    def test_a_prepared_transaction_counts_when_it_is_committed(self, source: Source) -> None:
        with open_temporary_postgres(max_prepared_transactions="2") as server:
            with psycopg.connect(server.url(), autocommit=True) as admin:
                admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
                with open_source("postgresql", credentials_of(server.url())) as other:
                    with other.change_feed("embedd_2pc") as feed:
                        follower = Follower(feed, T)
                        follower.attach()
                        admin.execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'")
                        assert follower.keys() == []
                        admin.execute("COMMIT PREPARED 'p'")
                        assert follower.keys() == [1]

    def test_a_transaction_of_200_000_rows_comes_in_parts_and_takes_bounded_memory(
        self, admin: Admin, follower: Follower
    ) -> None:
        admin.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1001, 201000) g")
        tracemalloc.start()
        began = time.perf_counter()
        keys, positions = [], []
        for batch in follower.feed.read(max_keys=1000):
            assert sum(map(len, batch.keys.values())) <= 1000
            keys += batch.keys.get(T, [])
            positions.append(batch.position)
        elapsed = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{len(keys) / elapsed:,.0f} rows/s under tracemalloc, peak {peak / 2**20:.1f} MB")
        assert keys == list(range(1001, 201001))
        assert positions[:200] == [None] * 200  # it is one transaction
        assert positions[-1] is not None
        assert peak < 40 * 2**20  # the 200,000 keys that are collected here are 8 of them

    def test_many_small_transactions_give_positions_in_between(self, admin: Admin, follower: Follower) -> None:
        for key in range(10, 50):
            admin.execute("INSERT INTO t VALUES (%s, 'x')", [key])
        keys = []
        for batch in follower.feed.read(max_keys=7):
            keys += batch.keys.get(T, [])
            if batch.position is not None:
                follower.feed.confirm(batch.position)
        assert keys == list(range(10, 50))
        assert follower.keys() == []

    @pytest.mark.parametrize("confirms", [False, True])
    def test_a_long_log_is_taken_in_parts(
        self, admin: Admin, follower: Follower, monkeypatch: pytest.MonkeyPatch, confirms: bool
    ) -> None:
        monkeypatch.setattr("embedd_dagster.sources.postgresql_changes._PEEK_MESSAGES", 20)
        for key in range(10, 50):
            admin.execute("INSERT INTO t VALUES (%s, 'x'), (%s, 'x')", [key, -key])
        keys: list[Any] = []
        for batch in follower.feed.read(max_keys=9):
            keys += batch.keys.get(T, [])
            if confirms and batch.position is not None:
                follower.feed.confirm(batch.position)
        assert keys == [key for number in range(10, 50) for key in (number, -number)]

    def test_a_read_ends_under_constant_writing(self, admin: Admin, writer: Admin, follower: Follower) -> None:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                writer.execute("UPDATE t SET v = v || 'x'")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(20):
                follower.read()
        finally:
            stop.set()
            thread.join()
        follower.read()
        assert follower.keys() == []

    def test_an_open_transaction_is_given_after_later_positions_were_confirmed(
        self, admin: Admin, writer: Admin, follower: Follower
    ) -> None:
        writer.execute("BEGIN; INSERT INTO t VALUES (10)")
        admin.execute("CREATE TABLE noise (id int); INSERT INTO noise SELECT generate_series(1, 9)")
        for number in range(5):
            admin.execute("INSERT INTO noise VALUES (1)")
            before = follower.position
            assert follower.keys() == []  # confirmed: the log of others can be forgotten
            assert follower.position is not None
            assert before is not None
            assert follower.position > before
            writer.execute("INSERT INTO t VALUES (%s)", [20 + number])
        writer.execute("COMMIT")
        assert follower.keys() == [10, 20, 21, 22, 23, 24]

    def test_what_is_not_confirmed_is_given_again(self, admin: Admin, source: Source, follower: Follower, name) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        first = follower.read(confirm=False)
        assert first[0].keys == {T: [4]}
        assert follower.read(confirm=False)[0].keys == {T: [4]}
        follower.feed.close()
        admin.execute("INSERT INTO t VALUES (5)")
        with source.change_feed(name) as again:
            other = Follower(again, T)
            other.position = follower.position
            attachment = other.attach()
            assert (attachment.joined, attachment.lost) == (set(), None)
            assert other.keys() == [4, 5]
            assert other.keys() == []

    def test_a_read_may_be_left_in_the_middle(self, admin: Admin, follower: Follower) -> None:
        admin.execute("INSERT INTO t SELECT g FROM generate_series(10, 3000) g")
        batches = follower.feed.read(max_keys=10)
        assert next(batches).keys == {T: list(range(10, 20))}
        batches.close()
        assert follower.keys() == list(range(10, 3001))

    def test_confirming_is_idempotent_and_never_goes_back(self, admin: Admin, follower: Follower, name: str) -> None:
        first = follower.position
        assert first is not None
        admin.execute("INSERT INTO t VALUES (4)")
        follower.read()
        assert follower.position is not None
        confirmed = one(admin, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", name)
        for position in (follower.position, first, 0, follower.position):
            follower.feed.confirm(position)
        assert confirmed == one(
            admin, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", name
        )
        assert follower.keys() == []

    def test_the_log_that_is_kept_is_told(self, admin: Admin, feed: ChangeFeed, table: None) -> None:
        assert feed.lag_bytes() is None
        follower = Follower(feed, T)
        follower.attach()
        before = feed.lag_bytes()
        assert before is not None
        admin.execute("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(10, 9999) g")
        found: list[int | None] = []
        thread = threading.Thread(target=lambda: found.append(feed.lag_bytes()))
        thread.start()
        thread.join()
        assert found[0] is not None
        assert found[0] > before + 1_000_000

    def test_an_idle_read_is_one_statement(self, admin: Admin, follower: Follower, monkeypatch) -> None:
        admin.execute("CREATE TABLE noise (id int)")
        follower.read(confirm=False)
        executed = []
        original = psycopg.Cursor.execute
        monkeypatch.setattr(
            psycopg.Cursor,
            "execute",
            lambda self, query, *args, **kwargs: (executed.append(query), original(self, query, *args, **kwargs))[1],
        )
        for _ in range(3):
            assert [batch.keys for batch in follower.read(confirm=False)] == [{}]
        assert len(executed) == 3
