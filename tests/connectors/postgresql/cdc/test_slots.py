"""Following a real PostgreSQL: what becomes of a feed when slot, publication, rights or the server change under it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.connectors.postgresql.cdc import pgoutput
from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.slot import Slot, lsn_text, parse_lsn
from embedd_dagster.connectors.registry import open_source
from embedd_dagster.errors import (
    CdcPositionLost,
    SourceRejected,
    SourceUnavailable,
)
from embedd_dagster.protocols.cdc import CdcStream, CdcTable, Subscription
from embedd_dagster.protocols.source import Source
from embedd_dagster.stack.postgres import EmbeddedPostgres, open_temporary_postgres
from embedd_dagster.stack.postgres_location import run_as
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


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server of this test alone, whose settings it may change."""
    with open_temporary_postgres() as server:
        yield server


class TestAlterations:
    @pytest.mark.parametrize(
        "harm",
        [
            "ALTER TABLE t REPLICA IDENTITY NOTHING",
            "ALTER TABLE t DROP CONSTRAINT t_pkey",
            "CREATE UNIQUE INDEX i ON t (id); ALTER TABLE t REPLICA IDENTITY USING INDEX i; DROP INDEX i",
        ],
    )
    def test_a_read_notices_that_updates_of_a_followed_table_fail(
        self, admin: Admin, feed: CdcStream, stream_reader: StreamReader, harm: str
    ) -> None:
        stream_reader.read()
        assert not feed.is_altered
        admin.execute(harm)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            admin.execute("UPDATE t SET v = 'fails'")
        stream_reader.read()
        assert feed.is_altered
        assert T in stream_reader.subscribe().rejected
        admin.execute("UPDATE t SET v = 'goes on'")
        stream_reader.read()
        assert not feed.is_altered

    def test_rows_that_change_and_are_counted_are_no_alteration(
        self, admin: Admin, feed: CdcStream, stream_reader: StreamReader
    ) -> None:
        stream_reader.read()
        admin.execute("INSERT INTO t SELECT g FROM generate_series(100, 3000) g")
        admin.execute("DELETE FROM t WHERE id > 1000")
        admin.execute("ANALYZE t")
        admin.execute("VACUUM t")
        stream_reader.read()
        assert not feed.is_altered


class TestLost:
    @pytest.mark.parametrize(
        ("harm", "says"),
        [
            ("SELECT pg_drop_replication_slot('{name}')", "slot .* is gone"),
            ("DROP PUBLICATION {name}", "Publication .* was dropped"),
            (
                (
                    "SELECT pg_drop_replication_slot('{name}');"
                    "SELECT pg_create_logical_replication_slot('{name}', 'test_decoding')"
                ),
                "of another kind",
            ),
            (
                "SELECT pg_drop_replication_slot('{name}'); SELECT pg_create_physical_replication_slot('{name}')",
                "of another kind",
            ),
            (
                (
                    "SELECT pg_drop_replication_slot('{name}');"
                    "SELECT pg_create_logical_replication_slot('{name}', 'pgoutput', false, true)"
                ),
                "before they are committed",
            ),
        ],
    )
    def test_a_slot_or_publication_that_is_gone_begins_anew(
        self, admin: Admin, stream_reader: StreamReader, name: str, harm: str, says: str
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        for statement in harm.format(name=name).split(";"):
            admin.execute(statement)
        admin.execute("INSERT INTO t VALUES (5)")
        with pytest.raises(CdcPositionLost):
            stream_reader.read()
        subscription = stream_reader.subscribe()
        assert subscription.newly_subscribed == {T}
        assert subscription.lost is not None
        assert re.search(says, subscription.lost)
        admin.execute("INSERT INTO t VALUES (6)")
        assert stream_reader.keys() == [6]
        assert stream_reader.subscribe() == Subscription(
            stream_reader.position, frozenset(), stream_reader.fingerprints, {}
        )

    def test_a_slot_that_is_gone_cannot_be_confirmed(
        self, admin: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        batches = stream_reader.read(confirm=False)
        admin.execute("SELECT pg_drop_replication_slot(%s)", [name])
        assert batches[-1].position is not None
        with pytest.raises(CdcPositionLost):
            stream_reader.feed.confirm(batches[-1].position)

    def test_a_slot_in_another_database_of_the_server(
        self, admin: Admin, postgres: EmbeddedPostgres, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("SELECT pg_drop_replication_slot(%s)", [name])
        with psycopg.connect(postgres.url(), autocommit=True) as elsewhere:
            elsewhere.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        with pytest.raises(CdcPositionLost, match="another database"):
            stream_reader.read()
        assert "another database" in (stream_reader.subscribe().lost or "")
        assert stream_reader.keys() == []

    @pytest.mark.parametrize("recreated", [False, True])
    def test_a_slot_that_was_moved_on(
        self, admin: Admin, stream_reader: StreamReader, name: str, recreated: bool
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        if recreated:
            admin.execute("SELECT pg_drop_replication_slot(%s)", [name])
            admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        else:
            admin.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [name])
        with pytest.raises(CdcPositionLost, match="moved on"):  # what lies between would never be read
            stream_reader.read()
        subscription = stream_reader.subscribe()
        assert subscription.newly_subscribed == {T}
        assert "moved on" in (subscription.lost or "")
        assert stream_reader.position == subscription.position
        assert stream_reader.keys() == []

    def test_a_slot_behind_the_known_position_is_what_a_crash_leaves(
        self, admin: Admin, stream_reader: StreamReader
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        batches = stream_reader.read(confirm=False)
        assert batches[-1].position is not None
        stream_reader.position = batches[-1].position
        subscription = stream_reader.subscribe()
        assert (subscription.newly_subscribed, subscription.lost) == (set(), None)
        assert stream_reader.keys() == [4]

    def test_a_server_that_was_restored(self, stream_reader: StreamReader) -> None:
        assert stream_reader.position is not None
        subscription = stream_reader.feed.subscribe(
            [T], lsn_text(parse_lsn(stream_reader.position) + 2**40), stream_reader.fingerprints
        )
        assert subscription.newly_subscribed == {T}
        assert "restored" in (subscription.lost or "")

    def test_a_slot_that_an_earlier_run_made_is_gone_on_from(
        self, admin: Admin, source: Source, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        stream_reader.feed.close()
        with source.cdc_stream(name) as again:
            other = StreamReader(again, T)
            subscription = other.subscribe()
            assert (subscription.newly_subscribed, subscription.lost) == ({T}, None)
            assert other.keys() == [4]

    def test_a_slot_that_another_session_reads(
        self, admin: Admin, writer: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(10, 400000) g")
        peek = (
            "SELECT count(*) FROM pg_logical_slot_peek_binary_changes("
            "%s, null, null, 'proto_version', '1', 'publication_names', %s)"
        )
        thread = threading.Thread(target=lambda: writer.execute(peek, [name, name]))
        thread.start()
        try:
            wait_until(lambda: one(admin, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", name))
            for use in (stream_reader.subscribe, stream_reader.read, stream_reader.feed.drop):
                with pytest.raises(SourceUnavailable, match="in use"):
                    use()
        finally:
            thread.join()
        wait_until(lambda: not one(admin, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", name))
        assert stream_reader.subscribe().lost is None

    def test_a_slot_that_the_server_invalidated(self, own_server: EmbeddedPostgres) -> None:
        with (
            psycopg.connect(own_server.url(), autocommit=True) as admin,
            open_source("postgresql", credentials_of(own_server.url())) as source,
            source.cdc_stream("embedd_invalidated") as feed,
        ):
            admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
            stream_reader = StreamReader(feed, T)
            stream_reader.subscribe()
            admin.execute("INSERT INTO t VALUES (1)")
            admin.execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'")
            admin.execute("SELECT pg_reload_conf()")
            for _ in range(3):
                admin.execute("CREATE TABLE noise AS SELECT g FROM generate_series(1, 1000) g; DROP TABLE noise")
                admin.execute("SELECT pg_switch_wal()")
            admin.execute("CHECKPOINT")
            assert one(admin, "SELECT wal_status FROM pg_replication_slots") == "lost"
            with pytest.raises(CdcPositionLost, match="invalidated"):
                stream_reader.read()
            with pytest.raises(CdcPositionLost, match="invalidated"):
                feed.confirm(lsn_text(parse_lsn(stream_reader.position or "0/0") + 1))
            assert feed.lag() is None
            subscription = stream_reader.subscribe()
            assert subscription.newly_subscribed == {T}
            assert "invalidated" in (subscription.lost or "")
            admin.execute("INSERT INTO t VALUES (2)")
            assert stream_reader.keys() == [2]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"wal_status": "reserved"}, None),  # 14
            ({"wal_status": "lost"}, "wal_removed"),
            ({"wal_status": "reserved", "conflicting": True}, "conflicting"),  # 16
            ({"wal_status": "lost", "invalidation_reason": "idle_timeout", "conflicting": False}, "idle_timeout"),  # 18
        ],
    )
    def test_versions_say_differently_that_a_slot_is_invalid(self, row: dict[str, Any], reason: str | None) -> None:
        assert Slot.parse({"plugin": "pgoutput", "confirmed_flush_lsn": "1/A", **row}).invalid_because == reason

    def test_a_log_that_leads_through_a_time_without_publication(
        self, admin: Admin, stream_reader: StreamReader, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Up to version 17 decoding fails there, although it exists now."""

        def fail(*_: Any, **__: Any) -> Iterator[bytes]:
            raise psycopg.errors.UndefinedObject(f'publication "{name}" does not exist')

        with monkeypatch.context() as patched:
            patched.setattr("embedd_dagster.connectors.postgresql.cdc.stream.peek_slot", fail)
            admin.execute("INSERT INTO t VALUES (4)")
            with pytest.raises(CdcPositionLost, match="made again"):
                stream_reader.read()
        subscription = stream_reader.subscribe()
        assert subscription.newly_subscribed == {T}
        assert subscription.lost is not None
        assert stream_reader.keys() == []

    def test_an_attach_that_dies_while_it_begins_anew_is_not_forgotten(
        self, admin: Admin, source: Source, stream_reader: StreamReader, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        admin.execute(f"DROP PUBLICATION {name}; INSERT INTO t VALUES (4)")

        def fail(*_: Any, **__: Any) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("embedd_dagster.connectors.postgresql.cdc.stream.create_slot", fail)
            with pytest.raises(KeyboardInterrupt):
                stream_reader.subscribe()
        stream_reader.feed.close()
        with source.cdc_stream(name) as again:
            subscription = again.subscribe([T], stream_reader.position, stream_reader.fingerprints)
            assert subscription.newly_subscribed == {T}
            assert subscription.lost is not None

    @pytest.mark.parametrize("stream_options", [StreamOptions(create_seconds=1.0)])
    def test_a_slot_waits_for_open_transactions_and_says_so(
        self, admin: Admin, writer: Admin, feed: CdcStream, table: None
    ) -> None:
        stream_reader = StreamReader(feed, T)
        with writer.transaction():
            writer.execute("INSERT INTO t VALUES (4)")
            with pytest.raises(SourceUnavailable, match="one has been open for long"):
                stream_reader.subscribe()
        assert stream_reader.subscribe().newly_subscribed == {T}

    def test_drop_leaves_nothing_and_may_be_repeated(
        self, admin: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        for _ in range(2):
            stream_reader.feed.drop()
            assert one(admin, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", name) == 0
            assert one(admin, "SELECT count(*) FROM pg_publication") == 0
        subscription = stream_reader.subscribe()
        assert subscription.newly_subscribed == {T}
        assert subscription.lost is not None
        assert stream_reader.keys() == []

    def test_close_may_be_repeated_and_ends_every_session(self, admin: Admin, stream_reader: StreamReader) -> None:
        ours = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'embedd' AND datname = current_database()"
        )
        stream_reader.feed.lag()
        for _ in range(2):
            stream_reader.feed.close()
        wait_until(lambda: one(admin, ours) == 0)
        with pytest.raises(SourceUnavailable, match="closed"):
            stream_reader.subscribe()


class TestPublications:
    def test_a_table_that_was_taken_out_joins_again(self, admin: Admin, stream_reader: StreamReader, name: str) -> None:
        admin.execute(f"ALTER PUBLICATION {name} DROP TABLE t; INSERT INTO t VALUES (4)")
        assert stream_reader.keys() == []
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (5)")
        assert stream_reader.keys() == [5]
        assert stream_reader.subscribe().newly_subscribed == set()

    def test_a_table_that_was_taken_out_and_put_in_joins_again(
        self, admin: Admin, stream_reader: StreamReader, name: str
    ) -> None:
        admin.execute(f"ALTER PUBLICATION {name} DROP TABLE t; INSERT INTO t VALUES (4)")
        admin.execute(f"ALTER PUBLICATION {name} ADD TABLE t")
        assert stream_reader.subscribe().newly_subscribed == {T}

    @pytest.mark.parametrize("kept", ["", "insert", "insert, update", "insert, update, delete"])
    def test_flags_that_were_turned_off(self, admin: Admin, stream_reader: StreamReader, name: str, kept: str) -> None:
        admin.execute(f"ALTER PUBLICATION {name} SET (publish = '{kept}')")
        assert stream_reader.subscribe().newly_subscribed == {T}
        assert stream_reader.subscribe().newly_subscribed == set()
        admin.execute("INSERT INTO t VALUES (4); UPDATE t SET id = 5 WHERE id = 4; DELETE FROM t WHERE id = 1")
        assert stream_reader.keys() == [4, 5, 1]
        admin.execute("TRUNCATE t")
        assert stream_reader.read()[0].truncated == {T}

    @pytest.mark.parametrize(("narrowed", "joins"), [("t WHERE (id > 5)", True), ("t (id)", False), ("t (w)", True)])
    def test_row_filters_and_column_lists(
        self, admin: Admin, stream_reader: StreamReader, name: str, narrowed: str, joins: bool
    ) -> None:
        admin.execute("ALTER TABLE t ADD COLUMN w int")
        admin.execute(f"ALTER PUBLICATION {name} SET TABLE {narrowed}")
        subscription = stream_reader.subscribe()
        assert subscription.newly_subscribed == {T}  # if only as it was taken out and put in
        admin.execute("INSERT INTO t VALUES (4, 'x'); DELETE FROM t WHERE id = 1")
        assert stream_reader.keys() == [4, 1]
        columns = one(admin, "SELECT attnames::text FROM pg_publication_tables WHERE pubname = %s", name)
        assert columns == ("{id,v,w}" if joins else "{id}")

    def test_an_admins_publication_of_all_tables(self, admin: Admin, feed: CdcStream, table: None, name: str) -> None:
        admin.execute(f"CREATE PUBLICATION {name} FOR ALL TABLES; CREATE TABLE other (id int PRIMARY KEY)")
        stream_reader = StreamReader(feed, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (4); INSERT INTO other VALUES (1)")
        assert stream_reader.keys() == [4]
        assert stream_reader.subscribe().newly_subscribed == set()

    def test_an_admins_publication_of_a_schema(self, admin: Admin, feed: CdcStream, table: None, name: str) -> None:
        admin.execute(f"CREATE PUBLICATION {name} FOR TABLES IN SCHEMA public")
        stream_reader = StreamReader(feed, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (4)")
        assert stream_reader.keys() == [4]
        assert stream_reader.subscribe().newly_subscribed == set()


class TestRights:
    @pytest.fixture
    def role(self, admin: Admin, table: None) -> Iterator[str]:
        """A user that may read `t`, and nothing more."""
        name = f"follower_{uuid4().hex[:8]}"
        admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'; GRANT SELECT ON t TO {name}")
        yield name
        admin.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")

    @pytest.fixture
    def limited(self, role: str, database_url: str) -> Iterator[Source]:
        with open_source("postgresql", credentials_of(database_url, user=role, password="secret")) as opened:
            yield opened

    def test_everything_that_is_missing_is_said_at_once(
        self, admin: Admin, role: str, limited: Source, name: str
    ) -> None:
        admin.execute("ALTER TABLE t REPLICA IDENTITY NOTHING")
        owner = f"owner_{uuid4().hex[:8]}"
        admin.execute(f"CREATE ROLE {owner}; ALTER TABLE t OWNER TO {owner}")
        try:
            error = refusal(limited, T)
            assert isinstance(error, SourceRejected)
            database = admin.info.dbname
            assert statements_of(error).split("; ") == [
                'ALTER TABLE "public"."t" REPLICA IDENTITY DEFAULT',
                f'GRANT "{owner}" TO "{role}"',
                f'ALTER ROLE "{role}" REPLICATION',
                f'GRANT CREATE ON DATABASE "{database}" TO "{role}";',
            ]
            with limited.cdc_stream(name) as feed:
                with pytest.raises(SourceRejected, match="no right to replicate") as caught:
                    feed.subscribe([T], None, {})
                assert "GRANT CREATE ON DATABASE" in caught.value.resolution
            admin.execute(statements_of(error))
            limited.check_cdc_eligible(T)
            with limited.cdc_stream(name) as feed:
                stream_reader = StreamReader(feed, T)
                assert stream_reader.subscribe().newly_subscribed == {T}
                admin.execute("INSERT INTO t VALUES (4)")
                assert stream_reader.keys() == [4]
                admin.execute(f"ALTER ROLE {role} NOREPLICATION; INSERT INTO t VALUES (5)")
                with pytest.raises(SourceRejected, match="no right to replicate"):
                    stream_reader.read()
                admin.execute(f"ALTER ROLE {role} REPLICATION")
                assert stream_reader.keys() == [5]
                feed.drop()
        finally:
            admin.execute(f"ALTER TABLE t OWNER TO CURRENT_USER; DROP OWNED BY {owner}; DROP ROLE {owner}")

    def test_not_the_owner(self, admin: Admin, role: str, limited: Source, name: str) -> None:
        admin.execute(f"ALTER ROLE {role} REPLICATION; GRANT CREATE ON DATABASE {admin.info.dbname} TO {role}")
        admin.execute(f"CREATE TABLE mine (id int PRIMARY KEY); ALTER TABLE mine OWNER TO {role}")
        mine = CdcTable("mine", "id")
        assert f'OWNER TO "{role}"' in refusal(limited, T).resolution
        with limited.cdc_stream(name) as feed:
            stream_reader = StreamReader(feed, T, mine)
            subscription = stream_reader.subscribe()
            assert subscription.newly_subscribed == {mine}
            assert statements_of(subscription.rejected[T]) == f'ALTER PUBLICATION "{name}" ADD TABLE "public"."t";'
            admin.execute(statements_of(subscription.rejected[T]))
            assert stream_reader.subscribe().newly_subscribed == {T}
            admin.execute("INSERT INTO t VALUES (4)")
            assert stream_reader.keys() == [4]
            limited.check_cdc_eligible(T)  # as it is published already
            feed.drop()

    def test_a_publication_that_is_not_ours(self, admin: Admin, role: str, limited: Source, name: str) -> None:
        admin.execute(f"ALTER ROLE {role} REPLICATION; CREATE TABLE other (id int PRIMARY KEY)")
        admin.execute(f"GRANT SELECT ON other TO {role}; CREATE TABLE extra (id int PRIMARY KEY)")
        admin.execute(f"CREATE PUBLICATION {name} FOR TABLE t, extra")
        other = CdcTable("other", "id")
        with limited.cdc_stream(name) as feed:
            stream_reader = StreamReader(feed, T, other)
            subscription = stream_reader.subscribe()
            assert subscription.newly_subscribed == {T}
            assert "ADD TABLE" in subscription.rejected[other].resolution
            admin.execute("INSERT INTO t VALUES (4); INSERT INTO extra VALUES (1)")
            assert stream_reader.keys() == [4]
            admin.execute(f"ALTER PUBLICATION {name} SET (publish = 'insert')")
            refused = stream_reader.subscribe().rejected[T]
            assert "is not ours to change" in refused.message
            admin.execute(statements_of(refused))
            stream_reader.subscribe()
            feed.drop()
        assert published(admin, name) == {"t", "extra"}
        assert one(admin, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", name) == 0


class TestServers:
    def test_wal_level_replica(self) -> None:
        with open_temporary_postgres(wal_level="replica") as server:
            with psycopg.connect(server.url(), autocommit=True) as admin:
                admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
                with open_source("postgresql", credentials_of(server.url())) as source:
                    error = refusal(source, T)
                    assert "wal_level" in error.message
                    assert "restart" in error.resolution
                    with source.cdc_stream("embedd_x") as feed, pytest.raises(SourceRejected, match="wal_level"):
                        feed.subscribe([T], None, {})
                    admin.execute(statements_of(error))

    def test_no_slot_is_left(self) -> None:
        with open_temporary_postgres(max_replication_slots="1") as server:
            with psycopg.connect(server.url(), autocommit=True) as admin:
                admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
                admin.execute("SELECT pg_create_physical_replication_slot('taken')")
                with open_source("postgresql", credentials_of(server.url())) as source:
                    assert "max_replication_slots" in refusal(source, T).message
                    with source.cdc_stream("embedd_x") as feed:
                        with pytest.raises(SourceRejected, match="max_replication_slots"):
                            feed.subscribe([T], None, {})
                        admin.execute("SELECT pg_drop_replication_slot('taken')")
                        assert feed.subscribe([T], None, {}).newly_subscribed == {T}
                    source.check_cdc_eligible(T)  # the one that is taken is ours
                    with (
                        source.cdc_stream("embedd_y") as another,
                        pytest.raises(SourceRejected, match="max_replication_slots"),
                    ):
                        another.subscribe([T], None, {})

    def test_a_standby(self, standby: str) -> None:
        with open_source("postgresql", credentials_of(standby)) as source:
            assert "standby" in refusal(source, T).message
            with source.cdc_stream("embedd_x") as feed, pytest.raises(SourceRejected, match="standby"):
                feed.subscribe([T], None, {})

    @pytest.fixture
    def standby(self) -> Iterator[str]:
        """The URL of a standby with `t`."""
        with open_temporary_postgres() as primary:
            with psycopg.connect(primary.url(), autocommit=True) as admin:
                admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
            directory = Path(tempfile.mkdtemp(prefix="embedd-standby-"))
            directory.chmod(0o711)
            replica = EmbeddedPostgres(directory)
            location = replica.location
            location.data.mkdir(mode=0o700)
            if location.account:
                os.chown(location.data, location.account.uid, location.account.gid)
            program = str(location.binaries / "pg_basebackup")
            copied = run_as(
                location.account, [program, "-d", primary.url(), "-D", str(location.data), "-R", "-c", "fast"]
            )
            assert copied.returncode == 0, copied.stdout
            (directory / "postgres" / "password").write_text(str(conninfo_to_dict(primary.url())["password"]))
            try:
                with replica:
                    yield replica.url()
            finally:
                replica.remove()
                shutil.rmtree(directory, ignore_errors=True)

    def test_a_restart(self, own_server: EmbeddedPostgres) -> None:
        url = own_server.url()
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
        with open_source("postgresql", credentials_of(url)) as source, source.cdc_stream("embedd_restart") as feed:
            stream_reader = StreamReader(feed, T)
            stream_reader.subscribe()
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute("INSERT INTO t VALUES (1)")
            own_server.stop()
            for use in (stream_reader.read, stream_reader.subscribe, feed.lag, feed.drop):
                with pytest.raises(SourceUnavailable):
                    use()
            own_server.start()
            assert own_server.url() == url
            subscription = stream_reader.subscribe()
            assert (subscription.newly_subscribed, subscription.lost) == (set(), None)
            assert stream_reader.keys() == [1]

    def test_a_connection_that_is_lost_in_the_middle_of_a_read_is_an_error_and_not_an_end(
        self, admin: Admin, stream_reader: StreamReader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        admin.execute("INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(10, 40000) g")
        original = pgoutput.inserted_value
        seen = []

        def count(data: bytes, column: int) -> Any:
            seen.append(1)
            if len(seen) == 1000:
                admin.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                    " WHERE application_name = 'embedd' AND datname = current_database()"
                )
            return original(data, column)

        monkeypatch.setattr(pgoutput, "inserted_value", count)
        with pytest.raises(SourceUnavailable):
            list(stream_reader.feed.read(max_keys=100))
        assert 1000 <= len(seen) < 39991
        assert stream_reader.keys() == list(range(10, 40001))

    def test_a_connection_that_was_lost_between_two_reads(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t VALUES (4)")
        admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'embedd' AND datname = current_database()"
        )
        with pytest.raises(SourceUnavailable):
            stream_reader.read()
        assert stream_reader.keys() == [4]

    def test_a_decoding_that_is_cancelled(self, admin: Admin, stream_reader: StreamReader) -> None:
        admin.execute("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(10, 300000) g")
        done = threading.Event()

        def cancel() -> None:
            while not done.is_set():
                admin.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'embedd'"
                    " AND datname = current_database() AND state = 'active' AND query LIKE '%peek%'"
                )

        thread = threading.Thread(target=cancel)
        thread.start()
        try:
            with pytest.raises(SourceUnavailable):
                stream_reader.read()
        finally:
            done.set()
            thread.join()
        assert len(stream_reader.keys()) == 299991

    def test_operators_in_the_search_path_are_not_called(
        self, admin: Admin, source: Source, feed: CdcStream, table: None
    ) -> None:
        admin.execute("CREATE FUNCTION evil(name, name) RETURNS bool LANGUAGE sql AS 'SELECT 1 / 0 = 1'")
        admin.execute("CREATE FUNCTION evil(pg_lsn, pg_lsn) RETURNS bool LANGUAGE sql AS 'SELECT 1 / 0 = 1'")
        admin.execute("CREATE OPERATOR = (FUNCTION = evil, LEFTARG = name, RIGHTARG = name)")
        admin.execute("CREATE OPERATOR < (FUNCTION = evil, LEFTARG = pg_lsn, RIGHTARG = pg_lsn)")
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET search_path = public, pg_catalog")
        stream_reader = StreamReader(feed, T)
        assert stream_reader.subscribe().newly_subscribed == {T}
        admin.execute("INSERT INTO t VALUES (4)")
        assert stream_reader.keys() == [4]
        feed.drop()

    def test_the_servers_log_is_spared(self, own_server: EmbeddedPostgres) -> None:
        with (
            psycopg.connect(own_server.url(), autocommit=True) as admin,
            open_source("postgresql", credentials_of(own_server.url())) as source,
            source.cdc_stream("embedd_quiet") as feed,
        ):
            admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
            stream_reader = StreamReader(feed, T)
            stream_reader.subscribe()
            for key in range(5):
                admin.execute("INSERT INTO t VALUES (%s)", [key])
                assert stream_reader.keys() == [key]
        assert "logical decoding" not in own_server._log_path.read_text()

    def test_a_name_is_checked(self, source: Source) -> None:
        for bad in ("", "x" * 51, "a-b", "A", "a;b", "ü"):
            with pytest.raises(ValueError, match="name"):
                source.cdc_stream(bad)

    def test_a_database_without_encoding(self, admin: Admin, database_url: str) -> None:
        name = f"ascii_{uuid4().hex[:8]}"
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'")
        try:
            url = database_url.rpartition("/")[0] + "/" + name
            with (
                psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection,
                open_source("postgresql", credentials_of(url)) as source,
                source.cdc_stream(name) as feed,
            ):
                connection.execute('CREATE TABLE "tü" ("ü" text PRIMARY KEY)')
                followed = CdcTable("tü", "ü")
                stream_reader = StreamReader(feed, followed)
                assert stream_reader.subscribe().newly_subscribed == {followed}
                connection.execute("INSERT INTO \"tü\" VALUES ('fine ü'), (E'\\xff')")
                (batch,) = stream_reader.read()
                assert batch.keys == {followed: ["fine ü"]}
                assert "UTF-8" in batch.broken[followed].message
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
