"""Following a real PostgreSQL: what a feed gives of every kind of change, of every kind of table and key."""

from __future__ import annotations

import threading
import time
import tracemalloc
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.slot import parse_lsn
from embedd_dagster.connectors.registry import open_source
from embedd_dagster.core.keys import encode_key
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.errors import (
    SourceRejected,
    SourceTableNotFound,
    SourceUnavailable,
)
from embedd_dagster.protocols.cdc import CdcStream, CdcTable, Lag, Subscription
from embedd_dagster.protocols.source import Selection, Source
from embedd_dagster.stack.postgres import open_temporary_postgres
from tests.support.cdc_source import (
    Admin,
    StreamReader,
    T,
    credentials_of,
    one,
    published,
    refusal,
    statements_of,
    wait_until,
)


class TestChanges:
    def test_insert_update_delete(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (4, 'y')")
        assert stream_reader.keys() == [4]
        admin.execute("UPDATE t SET v = 'z' WHERE id = 2")
        assert stream_reader.keys() == [2]
        admin.execute("DELETE FROM t WHERE id = 1")
        assert stream_reader.keys() == [1]
        assert stream_reader.keys() == []

    def test_a_changed_key_gives_the_old_and_the_new(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("UPDATE t SET id = 30 WHERE id = 3")
        assert stream_reader.keys() == [3, 30]

    def test_a_batch_says_how_many_changes_of_when(self, admin: Admin, stream_reader: StreamReader) -> None:
        before = datetime.now(UTC)
        admin.execute("UPDATE t SET v = 'a'")
        between = datetime.now(UTC)
        admin.execute("UPDATE t SET v = 'b'")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [1, 2, 3]}
        assert batch.change_count == 6
        assert batch.committed_at is not None
        assert before <= batch.committed_at <= between
        (batch,) = stream_reader.read()
        assert (batch.keys, batch.change_count, batch.committed_at) == ({}, 0, None)

    def test_order_is_that_of_commits(self, admin: Admin, writer: Admin, stream_reader: StreamReader) -> None:
        writer.execute("BEGIN; INSERT INTO t VALUES (10)")
        admin.execute("INSERT INTO t VALUES (11)")
        writer.execute("COMMIT")
        assert stream_reader.keys() == [11, 10]

    def test_truncate(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (9); TRUNCATE t; INSERT INTO t VALUES (1)")
        (batch,) = stream_reader.read()
        assert batch.truncated == {T}
        assert batch.keys == {T: [9, 1]}
        assert batch.change_count == 3
        # The log cannot tell it from a table that was rewritten: it is newly subscribed, and a comparison follows.
        assert stream_reader.subscribe().newly_subscribed == {T}
        assert stream_reader.subscribe().newly_subscribed == set()

    def test_truncate_cascade_names_every_table(self, admin: Admin, feed: CdcStream, table: None) -> None:
        admin.execute("CREATE TABLE child (id int PRIMARY KEY, t_id int REFERENCES t); CREATE TABLE other (id int)")
        child = CdcTable("child", "id")
        stream_reader = StreamReader(feed, T, child)
        stream_reader.subscribe()
        admin.execute("TRUNCATE t CASCADE")
        (batch,) = stream_reader.read()
        assert batch.truncated == {T, child}

    def test_rolled_back_transactions_and_savepoints(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("BEGIN; INSERT INTO t VALUES (10); ROLLBACK")
        admin.execute(
            "BEGIN; INSERT INTO t VALUES (11); SAVEPOINT s; INSERT INTO t VALUES (12); ROLLBACK TO s;"
            "SAVEPOINT s2; INSERT INTO t VALUES (13); RELEASE s2; COMMIT"
        )
        assert stream_reader.keys() == [11, 13]

    def test_a_prepared_transaction_counts_when_it_is_committed(self, source: Source) -> None:
        with open_temporary_postgres(max_prepared_transactions="2") as server:
            with psycopg.connect(server.url(), autocommit=True) as admin:
                admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
                with open_source("postgresql", credentials_of(server.url())) as other:
                    with other.cdc_stream("embedd_2pc") as feed:
                        stream_reader = StreamReader(feed, T)
                        stream_reader.subscribe()
                        admin.execute("BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'p'")
                        assert stream_reader.keys() == []
                        admin.execute("COMMIT PREPARED 'p'")
                        assert stream_reader.keys() == [1]

    def test_a_transaction_of_200_000_rows_comes_in_parts_and_takes_bounded_memory(
        self, admin: Admin, stream_reader: StreamReader
    ) -> None:
        admin.execute("INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1001, 201000) g")
        tracemalloc.start()
        began = time.perf_counter()
        keys, positions = [], []
        for batch in stream_reader.feed.read(max_keys=1000):
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

    def test_many_small_transactions_give_positions_in_between(self, admin: Admin, stream_reader: StreamReader) -> None:
        for key in range(10, 50):
            admin.execute("INSERT INTO t VALUES (%s, 'x')", [key])
        keys = []
        for batch in stream_reader.feed.read(max_keys=7):
            keys += batch.keys.get(T, [])
            if batch.position is not None:
                stream_reader.feed.confirm(batch.position)
        assert keys == list(range(10, 50))
        assert stream_reader.keys() == []

    @pytest.mark.parametrize("stream_options", [StreamOptions(peek_messages=20)])
    @pytest.mark.parametrize("confirms", [False, True])
    def test_a_long_log_is_taken_in_parts(self, admin: Admin, stream_reader: StreamReader, confirms: bool) -> None:
        for key in range(10, 50):
            admin.execute("INSERT INTO t VALUES (%s, 'x'), (%s, 'x')", [key, -key])
        keys: list[Any] = []
        for batch in stream_reader.feed.read(max_keys=9):
            keys += batch.keys.get(T, [])
            if confirms and batch.position is not None:
                stream_reader.feed.confirm(batch.position)
        assert keys == [key for number in range(10, 50) for key in (number, -number)]

    def test_a_read_ends_under_constant_writing(self, admin: Admin, writer: Admin, stream_reader: StreamReader) -> None:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                writer.execute("UPDATE t SET v = v || 'x'")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(20):
                stream_reader.read()
        finally:
            stop.set()
            thread.join()
        stream_reader.read()
        assert stream_reader.keys() == []

    def test_an_open_transaction_is_given_after_later_positions_were_confirmed(
        self, admin: Admin, writer: Admin, stream_reader: StreamReader
    ) -> None:
        writer.execute("BEGIN; INSERT INTO t VALUES (10)")
        admin.execute("CREATE TABLE noise (id int); INSERT INTO noise SELECT generate_series(1, 9)")
        for number in range(5):
            admin.execute("INSERT INTO noise VALUES (1)")
            before = stream_reader.position
            assert stream_reader.keys() == []  # confirmed: the log of others can be forgotten
            assert stream_reader.position is not None
            assert before is not None
            assert parse_lsn(stream_reader.position) > parse_lsn(before)
            writer.execute("INSERT INTO t VALUES (%s)", [20 + number])
        writer.execute("COMMIT")
        assert stream_reader.keys() == [10, 20, 21, 22, 23, 24]

    def test_what_is_not_confirmed_is_given_again(
        self, admin: Admin, source: Source, stream_reader: StreamReader, name
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        first = stream_reader.read(confirm=False)
        assert first[0].keys == {T: [4]}
        assert stream_reader.read(confirm=False)[0].keys == {T: [4]}
        stream_reader.feed.close()
        admin.execute("INSERT INTO t VALUES (5)")
        with source.cdc_stream(name) as again:
            other = StreamReader(again, T)
            other.position, other.fingerprints = stream_reader.position, stream_reader.fingerprints
            subscription = other.subscribe()
            assert (subscription.newly_subscribed, subscription.lost) == (set(), None)
            assert other.keys() == [4, 5]
            assert other.keys() == []

    def test_a_read_may_be_left_in_the_middle(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t SELECT g FROM generate_series(10, 3000) g")
        batches = stream_reader.feed.read(max_keys=10)
        assert next(batches).keys == {T: list(range(10, 20))}
        batches.close()
        assert stream_reader.keys() == list(range(10, 3001))

    def test_confirming_is_idempotent_and_never_goes_back(
        self, admin: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        first = stream_reader.position
        assert first is not None
        admin.execute("INSERT INTO t VALUES (4)")
        stream_reader.read()
        assert stream_reader.position is not None
        confirmed = one(admin, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", name)
        for position in (stream_reader.position, first, "0/0", stream_reader.position):
            stream_reader.feed.confirm(position)
        assert confirmed == one(
            admin, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s", name
        )
        assert stream_reader.keys() == []

    def test_the_log_that_is_kept_is_told(self, admin: Admin, feed: CdcStream, table: None) -> None:
        assert feed.lag() is None
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        before = feed.lag()
        assert before is not None
        admin.execute("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(10, 9999) g")
        found: list[Lag | None] = []
        thread = threading.Thread(target=lambda: found.append(feed.lag()))
        thread.start()
        thread.join()
        assert found[0] is not None
        assert found[0].unit == "bytes"
        assert found[0].amount > before.amount + 1_000_000

    def test_an_idle_read_is_two_statements_in_one_transaction(
        self, admin: Admin, stream_reader: StreamReader, monkeypatch
    ) -> None:
        admin.execute("CREATE TABLE noise (id int)")
        stream_reader.read(confirm=False)
        executed = []
        original = psycopg.Cursor.execute
        monkeypatch.setattr(
            psycopg.Cursor,
            "execute",
            lambda self, query, *args, **kwargs: (executed.append(query), original(self, query, *args, **kwargs))[1],
        )
        for _ in range(3):
            assert [batch.keys for batch in stream_reader.read(confirm=False)] == [{}]
        begins = [query for query in executed if isinstance(query, bytes) and query.startswith(b"BEGIN")]
        assert len(begins) == 3
        assert len(executed) - len(begins) == 6


KEYS: dict[str, tuple[str, list[Any]]] = {
    "smallint": ("smallint", [-5, 0, 7]),
    "int": ("int", [-5, 7]),
    "bigint": ("bigint", [-(2**63), 0, 2**63 - 1]),
    "text": ("text", ["", "B", "a", "a\nb", "ü🙂", " a "]),
    "varchar": ("varchar(5)", ["ab", "abcde", "ab  "]),
    "char": ("char(5)", ["ab", "abcde", " b"]),
    "citext": ("citext", ["Ab", "b"]),
    "uuid": ("uuid", [UUID(int=1), UUID(int=2**127)]),
    "numeric": ("numeric", [Decimal("-1.50"), Decimal("0"), Decimal(10**30), Decimal("NaN")]),
    "date": ("date", [date(1, 1, 1), date(2024, 2, 29), date(9999, 12, 31)]),
    "timestamp": (
        "timestamp",
        [datetime.fromisoformat("1999-01-01"), datetime.fromisoformat("2024-01-01T01:02:03.000456")],
    ),
    "timestamptz": ("timestamptz", [datetime(1999, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, 1, 2, 3, 456, UTC)]),
    "enum": ('"Mood %"', ["sad", "fine", "happy"]),
    "domain": ("positive", [1, 2]),
    "domain over char": ("code", ["a", "abc"]),
}


class TestKeys:
    @pytest.fixture(autouse=True)
    def _types(self, admin: Admin) -> None:
        admin.execute("CREATE EXTENSION citext; CREATE TYPE \"Mood %\" AS ENUM ('sad', 'fine', 'happy')")
        admin.execute("CREATE DOMAIN positive AS bigint CHECK (VALUE > 0); CREATE DOMAIN code AS char(4)")

    @pytest.mark.parametrize("kind", KEYS)
    def test_every_type_of_key_is_that_of_the_reader(
        self, admin: Admin, source: Source, feed: CdcStream, kind: str
    ) -> None:
        ddl, keys = KEYS[kind]
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET TimeZone = 'Asia/Tokyo'")
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET DateStyle = 'SQL, DMY'")
        admin.execute(f"CREATE TABLE t (v text, id {ddl} PRIMARY KEY)")
        stream_reader = StreamReader(feed, T)
        assert not stream_reader.subscribe().rejected
        for key in keys:
            admin.execute(f"INSERT INTO t VALUES ('x', %s::{ddl.replace('%', '%%')})", [key])
        inserted = stream_reader.keys()
        admin.execute("UPDATE t SET v = 'y'")
        updated = stream_reader.keys()
        pages = source.reader(Selection("t", "id", ())).read(KeyRange(), page_rows=99, page_bytes=9999)
        read = [row.key for page in pages for row in page]
        admin.execute("DELETE FROM t")
        deleted = stream_reader.keys()
        expected = sorted(map(encode_key, read))
        for given in (inserted, updated, deleted):
            assert sorted(map(encode_key, given)) == expected
            assert {type(key) for key in given} == {type(key) for key in read}

    def test_a_key_that_no_reader_gives_breaks_its_table_alone(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (id date PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
        u = CdcTable("u", "id")
        stream_reader = StreamReader(feed, T, u)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES ('infinity'), ('2024-01-01'); INSERT INTO u VALUES (1)")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [date(2024, 1, 1)], u: [1]}
        assert isinstance(batch.broken[T], SourceRejected)
        assert "infinity" not in repr(vars(batch.broken[T]))

    def test_rows_without_a_key_are_passed_over(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (id int UNIQUE); ALTER TABLE t REPLICA IDENTITY FULL")
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES (null); UPDATE t SET id = 5; UPDATE t SET id = null; DELETE FROM t")
        assert stream_reader.keys() == [5]

    def test_a_large_key_that_an_update_left_alone(self, admin: Admin, feed: CdcStream) -> None:
        """An index entry has at most some 2,700 bytes: so a key that is stored out of line has to be made so."""
        admin.execute("CREATE TABLE t (id text PRIMARY KEY, v text, w text)")
        admin.execute("ALTER TABLE t ALTER COLUMN id SET STORAGE EXTERNAL, ALTER COLUMN w SET STORAGE EXTERNAL")
        admin.execute("ALTER TABLE t SET (toast_tuple_target = 128)")
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        large = "k" * 2500
        admin.execute("INSERT INTO t VALUES (%s, 'x', repeat('w', 5000)), ('small', 'x', repeat('w', 5000))", [large])
        assert stream_reader.keys() == [large, "small"]
        admin.execute("UPDATE t SET v = 'y'")
        assert stream_reader.keys() == [large, "small"]
        admin.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        admin.execute("UPDATE t SET v = 'z'")
        assert stream_reader.keys() == [large, "small"]
        admin.execute("DELETE FROM t")
        assert stream_reader.keys() == [large, "small"]

    def test_two_followed_tables_on_one_table(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, slug text NOT NULL UNIQUE, v int)")
        admin.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        by_slug = CdcTable("public.T", "SLUG")
        stream_reader = StreamReader(feed, T, by_slug)
        assert stream_reader.subscribe().newly_subscribed == {T, by_slug}
        admin.execute("INSERT INTO t VALUES (1, 'one', 0); UPDATE t SET slug = 'eins'; DELETE FROM t")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [1], by_slug: ["one", "eins"]}
        assert batch.change_count == 3

    @pytest.mark.parametrize(
        ("table", "column"),
        [
            ('"; DROP TABLE x; --', '"; DROP TABLE x; --'),
            ("Straße 🙂", "schlüssel"),
            ("MiXed", "Id"),
            ("per%cent %s {}", "Id %s {}"),
            ("a.b", "c.d"),
            ("it's", "'"),
        ],
    )
    def test_hostile_names(self, admin: Admin, source: Source, feed: CdcStream, table: str, column: str) -> None:
        names = (sql.Identifier(table), sql.Identifier(column))
        admin.execute(sql.SQL("CREATE TABLE {} (v int, {} text PRIMARY KEY)").format(*names))
        followed = CdcTable(source.tables(5)[0].name, column)
        source.check_cdc_eligible(followed)
        stream_reader = StreamReader(feed, followed)
        assert stream_reader.subscribe().newly_subscribed == {followed}
        admin.execute(sql.SQL("INSERT INTO {} VALUES (1, 'k')").format(*names))
        assert stream_reader.keys(followed) == ["k"]
        admin.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY NOTHING").format(*names))
        for error in (stream_reader.subscribe().rejected[followed], refusal(source, followed)):
            assert "REPLICA IDENTITY DEFAULT" in error.resolution
        admin.execute(statements_of(error))
        assert stream_reader.subscribe().newly_subscribed == {followed}
        admin.execute(sql.SQL("TRUNCATE {}").format(*names))
        assert stream_reader.read()[0].truncated == {followed}


class TestChangedTables:
    def test_columns_are_added_and_dropped_in_the_middle(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (a int, id int PRIMARY KEY, b int)")
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        admin.execute(
            "INSERT INTO t VALUES (0, 1, 0); ALTER TABLE t ADD COLUMN c text; INSERT INTO t VALUES (0, 2, 0, 'x')"
        )
        admin.execute("ALTER TABLE t DROP COLUMN a; INSERT INTO t VALUES (3, 0, 'x')")
        admin.execute("BEGIN; INSERT INTO t VALUES (4); ALTER TABLE t DROP COLUMN b; INSERT INTO t VALUES (5); COMMIT")
        assert stream_reader.keys() == [1, 2, 3, 4, 5]
        assert stream_reader.subscribe().newly_subscribed == {
            T
        }  # no event reports a drop, and it may be one that is configured
        assert stream_reader.subscribe().newly_subscribed == set()

    def test_the_key_column_is_renamed(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (4); ALTER TABLE t RENAME COLUMN id TO nr; INSERT INTO t VALUES (5)")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [4]}
        assert isinstance(batch.broken[T], SourceTableNotFound)
        assert "'id'" in batch.broken[T].message
        refused = stream_reader.subscribe().rejected[T]
        assert isinstance(refused, SourceTableNotFound)
        assert "'id'" in refused.message
        admin.execute("ALTER TABLE t RENAME COLUMN nr TO id")
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (6)")
        assert stream_reader.keys() == [6]

    def test_the_key_column_gets_another_type(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        admin.execute("ALTER TABLE t ALTER COLUMN id TYPE text USING 'n' || id; INSERT INTO t VALUES ('n5')")
        assert stream_reader.keys() == [4, "n5"]
        assert stream_reader.subscribe().newly_subscribed == {T}  # all of its rows were written again

    def test_the_key_column_gets_a_type_that_was_unknown(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("CREATE TYPE mood AS ENUM ('sad', 'happy'); DELETE FROM t")
        stream_reader.keys()
        admin.execute("ALTER TABLE t ALTER COLUMN id TYPE mood USING null; INSERT INTO t VALUES ('sad')")
        (batch,) = stream_reader.read()
        assert "type of column 'id'" in batch.broken[T].message
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES ('happy')")
        assert stream_reader.keys() == ["happy"]

    def test_the_table_is_renamed(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("ALTER TABLE t RENAME TO elsewhere; INSERT INTO elsewhere VALUES (4)")
        assert stream_reader.keys() == [4]
        refused = stream_reader.subscribe().rejected[T]
        assert isinstance(refused, SourceTableNotFound)
        assert '"public"."elsewhere"' in refused.message
        assert stream_reader.subscribe().rejected[T].message == refused.message
        admin.execute("ALTER TABLE elsewhere RENAME TO t")
        assert stream_reader.subscribe().newly_subscribed == {T}

    def test_the_table_is_swapped_for_another(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("CREATE TABLE new (id int PRIMARY KEY, v text)")
        admin.execute("BEGIN; ALTER TABLE t RENAME TO old; ALTER TABLE new RENAME TO t; COMMIT")
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (70); INSERT INTO old VALUES (71)")
        assert stream_reader.keys() == [70]

    def test_the_table_is_dropped_and_made_again(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (4); DROP TABLE t")
        assert stream_reader.keys() == [4]
        assert isinstance(stream_reader.subscribe().rejected[T], SourceTableNotFound)
        admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (5)")
        assert stream_reader.keys() == [5]

    def test_a_table_that_is_written_anew_joins_again(self, admin: Admin, stream_reader: StreamReader) -> None:
        assert stream_reader.subscribe().newly_subscribed == set()
        admin.execute("ALTER TABLE t ALTER COLUMN v TYPE varchar USING upper(v)")
        assert stream_reader.keys() == []  # the log does not tell
        assert stream_reader.subscribe().newly_subscribed == {T}
        assert stream_reader.subscribe().newly_subscribed == set()

    @pytest.mark.parametrize(
        "change",
        [
            "ALTER TABLE t ALTER COLUMN v TYPE text USING upper(v)",
            "ALTER PUBLICATION {name} DROP TABLE t; INSERT INTO t VALUES (4); ALTER PUBLICATION {name} ADD TABLE t",
            (
                "ALTER PUBLICATION {name} SET (publish = 'delete'); INSERT INTO t VALUES (4);"
                "ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate')"
            ),
            "ALTER TABLE t ADD COLUMN w text; BEGIN; ALTER TABLE t RENAME v TO o; ALTER TABLE t RENAME w TO v; COMMIT",
            "ALTER TABLE t DROP COLUMN v, ADD COLUMN v text DEFAULT 'new'",
            "ALTER TABLE t ALTER COLUMN v TYPE varchar",
        ],
        ids=["rewritten", "taken out", "published in part", "swapped", "dropped and added", "altered"],
    )
    @pytest.mark.parametrize("is_open", [True, False])
    def test_what_no_event_tells_joins_the_table_again_also_where_nobody_followed_it(
        self, admin: Admin, source: Source, stream_reader: StreamReader, name: str, change: str, is_open: bool
    ) -> None:
        assert stream_reader.subscribe().newly_subscribed == set()
        if not is_open:
            stream_reader.feed.close()
        for statement in change.format(name=name).split(";"):
            admin.execute(statement)
        with source.cdc_stream(name) as again:
            if not is_open:
                stream_reader.feed = again
            shapes = stream_reader.fingerprints
            assert stream_reader.subscribe().newly_subscribed == {T}
            stream_reader.fingerprints = shapes  # killed before they were kept
            assert stream_reader.subscribe().newly_subscribed == {T}
            assert stream_reader.subscribe().newly_subscribed == set()

    def test_a_column_that_goes_is_a_reason_to_join_again_and_so_is_one_that_takes_its_name(
        self, admin: Admin, stream_reader: StreamReader
    ) -> None:
        admin.execute("ALTER TABLE t ADD COLUMN w text")
        assert stream_reader.subscribe().newly_subscribed == set()
        for statement in ("RENAME v TO o", "RENAME o TO v", "DROP COLUMN v", "RENAME w TO v"):
            admin.execute(f"ALTER TABLE t {statement}")
            assert stream_reader.subscribe().newly_subscribed == {T}
            assert stream_reader.subscribe().newly_subscribed == set()

    def test_a_table_whose_shape_was_never_kept_is_taken_to_be_unchanged(
        self, admin: Admin, source: Source, stream_reader: StreamReader, name: str
    ) -> None:
        """As of an installation that kept none until now."""
        stream_reader.fingerprints = {T: None}
        assert stream_reader.subscribe().newly_subscribed == set()
        admin.execute(f"ALTER PUBLICATION {name} DROP TABLE t")
        stream_reader.fingerprints = {T: None}
        assert stream_reader.subscribe().newly_subscribed == {T}

    def test_tables_come_and_go(self, admin: Admin, stream_reader: StreamReader, name: str) -> None:
        admin.execute("CREATE TABLE u (id int PRIMARY KEY)")
        u = CdcTable("u", "id")
        admin.execute("INSERT INTO t VALUES (4); INSERT INTO u VALUES (1)")
        stream_reader.tables = (T, u)
        assert stream_reader.subscribe().newly_subscribed == {u}
        admin.execute("INSERT INTO u VALUES (2)")
        batches = stream_reader.read()
        assert batches[-1].keys == {T: [4], u: [2]}
        stream_reader.tables = (u,)
        assert stream_reader.subscribe() == Subscription(
            stream_reader.position, frozenset(), stream_reader.fingerprints, {}
        )
        assert published(admin, name) == {"u"}
        admin.execute("INSERT INTO t VALUES (5); INSERT INTO u VALUES (3)")
        assert stream_reader.keys(u) == [3]
        stream_reader.tables = ()
        assert stream_reader.subscribe().newly_subscribed == set()
        assert published(admin, name) == set()
        admin.execute("INSERT INTO u VALUES (4)")
        assert stream_reader.keys(u) == []

    def test_a_table_joins_when_the_transactions_that_wrote_to_it_have_ended(
        self, admin: Admin, writer: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("CREATE TABLE u (id int PRIMARY KEY)")
        u = CdcTable("u", "id")
        stream_reader.tables = (T, u)
        writer.execute("BEGIN; INSERT INTO u VALUES (1)")
        for _ in range(2):
            subscription = stream_reader.subscribe()
            assert subscription.newly_subscribed == set()
            assert isinstance(subscription.rejected[u], SourceUnavailable)
            assert published(admin, name) == {"t"}
        admin.execute("INSERT INTO t VALUES (4)")
        assert stream_reader.keys() == [4]  # the others are followed all the same
        threading.Timer(0.3, lambda: writer.execute("COMMIT")).start()
        wait_until(lambda: stream_reader.subscribe().newly_subscribed == {u})
        admin.execute("INSERT INTO u VALUES (2)")
        assert stream_reader.keys(u) == [2]

    def test_a_table_waits_for_a_short_transaction(
        self, admin: Admin, writer: Admin, stream_reader: StreamReader
    ) -> None:
        admin.execute("CREATE TABLE u (id int PRIMARY KEY)")
        u = CdcTable("u", "id")
        stream_reader.tables = (T, u)
        writer.execute("BEGIN; INSERT INTO u VALUES (1)")
        timer = threading.Timer(0.5, lambda: writer.execute("COMMIT"))
        timer.start()
        assert stream_reader.subscribe().newly_subscribed == {u}
        assert one(admin, "SELECT count(*) FROM u") == 1  # a comparison that begins now sees it
        timer.join()

    def test_a_locked_table_does_not_hold_up_the_others(
        self, admin: Admin, writer: Admin, stream_reader: StreamReader
    ) -> None:
        admin.execute("CREATE TABLE u (id int PRIMARY KEY); CREATE TABLE w (id int PRIMARY KEY)")
        u, w = CdcTable("u", "id"), CdcTable("w", "id")
        stream_reader.tables = (T, u, w)
        with writer.transaction():
            writer.execute("LOCK TABLE u IN SHARE UPDATE EXCLUSIVE MODE")  # as VACUUM does
            subscription = stream_reader.subscribe()
            assert subscription.newly_subscribed == {w}
            assert isinstance(subscription.rejected[u], SourceUnavailable)
        assert stream_reader.subscribe().newly_subscribed == {u}


class TestPartitions:
    @pytest.fixture(autouse=True)
    def _partitioned(self, admin: Admin) -> None:
        admin.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);"
            "CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (100);"
            "CREATE TABLE high PARTITION OF t FOR VALUES FROM (100) TO (200)"
        )

    def test_the_root(self, admin: Admin, source: Source, feed: CdcStream) -> None:
        source.check_cdc_eligible(T)
        stream_reader = StreamReader(feed, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (1, 'x'); INSERT INTO high VALUES (101, 'x')")
        assert stream_reader.keys() == [1, 101]
        admin.execute("UPDATE t SET id = 150 WHERE id = 1")  # moves from one partition to the other
        assert stream_reader.keys() == [1, 150]
        admin.execute("CREATE TABLE more PARTITION OF t FOR VALUES FROM (200) TO (300); INSERT INTO t VALUES (250)")
        assert stream_reader.keys() == [250]
        admin.execute("TRUNCATE t")
        assert stream_reader.read()[0].truncated == {T}

    def test_a_leaf_alone_and_with_its_root(self, admin: Admin, feed: CdcStream, name: str) -> None:
        low = CdcTable("low", "id")
        stream_reader = StreamReader(feed, low)
        assert stream_reader.subscribe().newly_subscribed == {low}
        admin.execute("INSERT INTO t VALUES (1, 'x'), (101, 'x')")
        assert stream_reader.keys(low) == [1]
        stream_reader.tables = (low, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (2, 'x')")
        (batch,) = stream_reader.read()
        assert batch.keys == {low: [2], T: [2]}  # logged as of the root
        admin.execute("TRUNCATE t")
        assert stream_reader.read()[0].truncated == {low, T}
        stream_reader.tables = (low,)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES (3, 'x'), (103, 'x')")
        assert stream_reader.keys(low) == [3]

    @pytest.mark.parametrize(
        "change",
        [
            "DROP TABLE high",
            "ALTER TABLE t DETACH PARTITION high",
            "TRUNCATE high",
            (
                "CREATE TABLE n (id int PRIMARY KEY, v text); INSERT INTO n VALUES (1000);"
                "ALTER TABLE t ATTACH PARTITION n FOR VALUES FROM (1000) TO (2000)"
            ),
        ],
    )
    def test_what_is_done_to_a_whole_partition_is_not_logged_and_joins_the_table_again(
        self, admin: Admin, feed: CdcStream, change: str
    ) -> None:
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES (101, 'x')")
        assert stream_reader.keys() == [101]
        assert stream_reader.subscribe().newly_subscribed == set()
        admin.execute(change)
        assert stream_reader.keys() == []
        assert stream_reader.subscribe().newly_subscribed == {T}
        assert stream_reader.subscribe().newly_subscribed == set()

    def test_partitions_of_partitions(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute(
            "CREATE TABLE deep PARTITION OF t FOR VALUES FROM (200) TO (400) PARTITION BY RANGE (id);"
            "CREATE TABLE deeper PARTITION OF deep FOR VALUES FROM (200) TO (300)"
        )
        deeper = CdcTable("deeper", "id")
        stream_reader = StreamReader(feed, T, deeper)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES (1, 'x'), (201, 'x')")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [1, 201], deeper: [1, 201]}  # more than its own, as all are logged as of the root

    def test_a_root_without_a_primary_key_is_refused(self, admin: Admin, source: Source, feed: CdcStream) -> None:
        """A partition that is made later would have no replica identity, and its owner's UPDATE would fail."""
        admin.execute(
            "CREATE TABLE p (id int, day date) PARTITION BY RANGE (day);"
            "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');"
            "ALTER TABLE p1 REPLICA IDENTITY FULL"
        )
        p = CdcTable("p", "id")
        refused = StreamReader(feed, p).subscribe().rejected[p]
        assert refused.resolution == refusal(source, p).resolution
        assert statements_of(refused) == 'ALTER TABLE "public"."p" ADD PRIMARY KEY ("id", "day");'
        admin.execute(statements_of(refused))
        source.check_cdc_eligible(p)
        stream_reader = StreamReader(feed, p)
        assert stream_reader.subscribe().newly_subscribed == {p}
        admin.execute("CREATE TABLE p2 PARTITION OF p FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')")
        admin.execute("INSERT INTO p VALUES (1, '2025-02-02'); UPDATE p SET id = 2; DELETE FROM p")
        assert stream_reader.keys(p) == [1, 2]

    def test_a_partition_without_an_identity_takes_all_of_it_out(
        self, admin: Admin, feed: CdcStream, name: str
    ) -> None:
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        admin.execute("ALTER TABLE high REPLICA IDENTITY NOTHING; INSERT INTO t VALUES (101, 'x')")
        refused = stream_reader.subscribe().rejected[T]
        assert statements_of(refused) == 'ALTER TABLE "public"."high" REPLICA IDENTITY DEFAULT;'
        admin.execute("UPDATE t SET v = 'y'")
        admin.execute(statements_of(refused))
        assert stream_reader.subscribe().newly_subscribed == {T}

    def test_an_admins_publication_by_partition_is_mended(self, admin: Admin, feed: CdcStream, name: str) -> None:
        admin.execute(f"CREATE PUBLICATION {name} FOR TABLE t")
        stream_reader = StreamReader(feed, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("CREATE TABLE more PARTITION OF t FOR VALUES FROM (200) TO (300); INSERT INTO t VALUES (250)")
        assert stream_reader.keys() == [250]


# the table's definition, then what makes its identity; what our statement is; None where it is fit
IDENTITIES: dict[str, tuple[str, str | None]] = {
    "primary key": ("CREATE TABLE t (id int PRIMARY KEY, v int)", None),
    "primary key of two": ("CREATE TABLE t (id int, v int, PRIMARY KEY (v, id))", None),
    "full": ("CREATE TABLE t (id int, v int); ALTER TABLE t REPLICA IDENTITY FULL", None),
    "index": (
        ("CREATE TABLE t (id int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (id);"
        "ALTER TABLE t REPLICA IDENTITY USING INDEX i"),
        None,
    ),
    "nothing": ("CREATE TABLE t (id int PRIMARY KEY, v int); ALTER TABLE t REPLICA IDENTITY NOTHING", "DEFAULT"),
    "no key at all": ("CREATE TABLE t (id int, v int)", "FULL"),
    "a unique index": (
        'CREATE TABLE t (id int NOT NULL, v int); CREATE UNIQUE INDEX "I x" ON t (id)', 'USING INDEX "I x"',
    ),
    "a unique index of a nullable column": ("CREATE TABLE t (id int UNIQUE, v int)", "FULL"),
    "a partial index": ("CREATE TABLE t (id int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (id) WHERE v > 0", "FULL"),
    "another column's primary key": ("CREATE TABLE t (id int NOT NULL, v int PRIMARY KEY)", "FULL"),
    "another column's primary key next to ours": (
        "CREATE TABLE t (id int NOT NULL CONSTRAINT u UNIQUE, v int PRIMARY KEY)", 'USING INDEX "u"',
    ),
    "only included": (
        ("CREATE TABLE t (id int NOT NULL, v int NOT NULL); CREATE UNIQUE INDEX i ON t (v) INCLUDE (id);"
        "ALTER TABLE t REPLICA IDENTITY USING INDEX i"),
        "FULL",
    ),
    "an index that was dropped": (
        ("CREATE TABLE t (id int NOT NULL, v int); CREATE UNIQUE INDEX i ON t (id);"
        "ALTER TABLE t REPLICA IDENTITY USING INDEX i; DROP INDEX i"),
        "FULL",
    ),
    "a deferrable primary key": ("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v int)", "FULL"),
    "full, with a stored generated column": (
        "CREATE TABLE t (id int, v int, g int GENERATED ALWAYS AS (v + 1) STORED); ALTER TABLE t REPLICA IDENTITY FULL",
        None,
    ),
    "a stored generated key": (
        "CREATE TABLE t (v int, id int GENERATED ALWAYS AS (v + 1) STORED PRIMARY KEY)", None,
    ),
    "full, with a virtual generated column": (
        ("CREATE TABLE t (id int NOT NULL UNIQUE, v int, g int GENERATED ALWAYS AS (v + 1) VIRTUAL);"
        "ALTER TABLE t REPLICA IDENTITY FULL"),
        'USING INDEX "t_id_key"',
    ),
}  # fmt: skip


class TestIdentities:
    @pytest.mark.parametrize("kind", IDENTITIES)
    def test_a_table_is_refused_with_the_statement_that_helps_and_its_owner_can_write_all_the_while(
        self, admin: Admin, source: Source, feed: CdcStream, kind: str
    ) -> None:
        ddl, identity = IDENTITIES[kind]
        admin.execute(ddl)
        stream_reader = StreamReader(feed, T)
        subscription = stream_reader.subscribe()
        writes = "INSERT INTO t (v) VALUES (6)" if "STORED PRIMARY" in ddl else "INSERT INTO t (id, v) VALUES (7, 6)"
        writes += "; UPDATE t SET v = 8; DELETE FROM t"
        if identity is not None:
            admin.execute(writes)
            assert stream_reader.keys() == []
            for error in (refusal(source, T), subscription.rejected[T]):
                assert isinstance(error, SourceRejected)
                assert statements_of(error) == f'ALTER TABLE "public"."t" REPLICA IDENTITY {identity};'
            admin.execute(statements_of(error))
            subscription = stream_reader.subscribe()
        source.check_cdc_eligible(T)
        assert not subscription.rejected
        assert subscription.newly_subscribed == {T}
        admin.execute(writes)
        assert stream_reader.keys() == ([7, 9] if "STORED PRIMARY" in ddl else [7])
        admin.execute("ALTER TABLE t REPLICA IDENTITY NOTHING; INSERT INTO t (v) VALUES (1)" if "STORED PRIMARY" in ddl
                      else "ALTER TABLE t REPLICA IDENTITY NOTHING; INSERT INTO t (id, v) VALUES (1, 1)")  # fmt: skip
        assert T in stream_reader.subscribe().rejected
        admin.execute("UPDATE t SET v = 2")  # it was taken out at once

    def test_where_no_identity_can_be_had_it_says_so(self, admin: Admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int, v int GENERATED ALWAYS AS (id + 1) VIRTUAL)")
        error = refusal(source, T)
        assert "unique index" in error.resolution
        assert refusal(source, CdcTable("t", "v")).resolution.startswith("Use sync_mode batch")

    def test_changes_that_were_logged_without_the_key_break_the_table(self, admin: Admin, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (id int NOT NULL UNIQUE, v int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY FULL")
        stream_reader = StreamReader(feed, T)
        stream_reader.subscribe()
        admin.execute("INSERT INTO t VALUES (1, 1); ALTER TABLE t REPLICA IDENTITY DEFAULT; DELETE FROM t")
        (batch,) = stream_reader.read()
        assert batch.keys == {T: [1]}
        assert "replica identity" in batch.broken[T].message
        assert T in stream_reader.subscribe().rejected

    @pytest.mark.parametrize(
        ("ddl", "says"),
        [
            ("CREATE VIEW t AS SELECT 1 AS id", "a view"),
            ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", "a materialized view"),
            (("CREATE TABLE base (id int PRIMARY KEY); CREATE TABLE t () INHERITS (base);"
             "ALTER TABLE t RENAME TO c; ALTER TABLE base RENAME TO t"), "inherit"),
            (("CREATE EXTENSION file_fdw; CREATE SERVER s FOREIGN DATA WRAPPER file_fdw;"
             "CREATE FOREIGN TABLE t (id int) SERVER s OPTIONS (filename '/nothing')"), "a foreign table"),
        ],
    )  # fmt: skip
    def test_what_has_no_log(self, admin: Admin, source: Source, feed: CdcStream, ddl: str, says: str) -> None:
        try:
            admin.execute(ddl)
        except psycopg.errors.FeatureNotSupported:
            pytest.skip("this server has no foreign data wrapper")
        for error in (refusal(source, T), StreamReader(feed, T).subscribe().rejected[T]):
            assert says in error.message
            assert "sync_mode batch" in error.resolution

    def test_an_unlogged_table(self, admin: Admin, source: Source, feed: CdcStream) -> None:
        admin.execute("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)")
        admin.execute(statements_of(refusal(source, T)))
        source.check_cdc_eligible(T)
        assert StreamReader(feed, T).subscribe().newly_subscribed == {T}
        admin.execute("ALTER TABLE t SET LOGGED")

    def test_a_column_that_is_no_key_or_not_there(self, admin: Admin, source: Source, feed: CdcStream) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v float8)")
        v, w = CdcTable("t", "v"), CdcTable("t", "w")
        refused = StreamReader(feed, T, v, w).subscribe().rejected
        assert refused.keys() == {v, w}
        assert type(refused[v]) is type(refusal(source, v)) is SourceRejected
        assert type(refused[w]) is type(refusal(source, w)) is SourceTableNotFound
