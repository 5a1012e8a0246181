"""Following a source whose commits wait for a synchronous standby, which is a real `pg_receivewal`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.visibility import Snapshot
from embedd_dagster.errors import SourceUnavailable
from embedd_dagster.protocols.cdc import CdcStream, CdcTable
from embedd_dagster.protocols.source import Selection, Source
from tests.support.cdc_source import Admin, StreamReader, T, one, wait_until
from tests.support.synchronous_standby import WAITS, SynchronousStandby

pytestmark = pytest.mark.parametrize(
    "stream_options", [StreamOptions(visible_seconds=0.2, writers_seconds=0.2, commits_seconds=0.2)]
)


class Committing:
    """Runs statements in a session whose commits wait for the standby."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool = ThreadPoolExecutor(4)

    def run(self, statement: str) -> Future[None]:
        return self._pool.submit(self._run, statement)

    def _run(self, statement: str) -> None:
        with psycopg.connect(self._url, autocommit=True, application_name="committing") as connection:
            connection.execute(WAITS)
            connection.execute(statement)

    def close(self) -> None:
        self._pool.shutdown(wait=True)


@pytest.fixture
def committing(database_url: str, standby: SynchronousStandby) -> Iterator[Committing]:
    made = Committing(database_url)
    yield made
    standby.go_on()
    made.close()


def waits(admin: Admin, count: int = 1) -> None:
    """Returns when so many commits wait for the standby."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'committing' AND wait_event = 'SyncRep'"
    wait_until(lambda: bool(one(admin, statement) == count))


@pytest.mark.parametrize(
    ("statement", "keys"),
    [
        ("INSERT INTO t VALUES (4, 'new')", [4]),
        ("UPDATE t SET v = 'new' WHERE id = 1", [1]),
        ("DELETE FROM t WHERE id = 1", [1]),
        ("BEGIN; INSERT INTO t VALUES (4); SAVEPOINT s; INSERT INTO t VALUES (5); RELEASE s; COMMIT", [4, 5]),
    ],
)
def test_changes_are_given_only_when_a_reader_sees_their_rows(
    admin: Admin,
    source: Source,
    stream_reader: StreamReader,
    standby: SynchronousStandby,
    committing: Committing,
    statement: str,
    keys: list[int],
) -> None:
    standby.stop()
    done = committing.run(statement)
    waits(admin)
    with pytest.raises(SourceUnavailable, match=r"1 transaction .* synchronous standby"):
        stream_reader.read()
    assert not done.done()
    standby.go_on()
    assert stream_reader.keys() == keys
    reader = source.reader(Selection("t", "id", ("v",)))
    found = {row.key: row.values[0] for page in reader.read_keys(keys, page_bytes=1000) for row in page}
    expected = admin.execute("SELECT id, v FROM t WHERE id = ANY (%s)", [keys]).fetchall()
    assert done.result() is None
    assert found == dict(expected)


def test_a_truncate_is_given_only_when_a_reader_finds_the_table_empty(
    admin: Admin,
    stream_reader: StreamReader,
    standby: SynchronousStandby,
    committing: Committing,
) -> None:
    standby.stop()
    committing.run("TRUNCATE t")
    waits(admin)
    with pytest.raises(SourceUnavailable, match="synchronous standby"):
        stream_reader.read()
    standby.go_on()
    (batch,) = stream_reader.read()
    assert batch.truncated == {T}
    assert one(admin, "SELECT count(*) FROM t") == 0


def test_nothing_is_confirmed_while_a_commit_waits_for_the_standby(
    admin: Admin,
    stream_reader: StreamReader,
    standby: SynchronousStandby,
    committing: Committing,
    name: str,
) -> None:
    statement = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    before = one(admin, statement, name)
    standby.stop()
    committing.run("UPDATE t SET v = 'waits' WHERE id = 1")
    waits(admin)
    admin.execute("UPDATE t SET v = 'does not wait' WHERE id = 2")
    with pytest.raises(SourceUnavailable):
        stream_reader.read()
    assert one(admin, statement, name) == before
    standby.go_on()
    assert stream_reader.keys() == [1, 2]


def test_a_change_that_waits_for_no_standby_is_given_at_once(
    admin: Admin, stream_reader: StreamReader, standby: SynchronousStandby
) -> None:
    standby.stop()
    admin.execute("INSERT INTO t VALUES (4)")
    assert stream_reader.keys() == [4]


def test_a_table_joins_only_when_a_reader_sees_what_was_committed_before(
    admin: Admin,
    feed: CdcStream,
    stream_reader: StreamReader,
    standby: SynchronousStandby,
    committing: Committing,
) -> None:
    """By a publication that the standby does not acknowledge either: the table is added all the same."""
    admin.execute("CREATE TABLE other (id int PRIMARY KEY)")
    standby.stop()
    committing.run("INSERT INTO other VALUES (1)")
    waits(admin)
    both = StreamReader(feed, T, CdcTable("other", "id"))
    both.position, both.fingerprints = stream_reader.position, stream_reader.fingerprints
    subscription = both.subscribe()
    assert set(subscription.rejected) == {CdcTable("other", "id")}
    standby.go_on()
    wait_until(lambda: both.subscribe().newly_subscribed == {CdcTable("other", "id")})
    assert one(admin, "SELECT count(*) FROM other") == 1


def test_a_new_slot_waits_for_commits_that_it_leaves_out(
    admin: Admin,
    writer: Admin,
    database_url: str,
    feed: CdcStream,
    table: None,
    standby: SynchronousStandby,
    committing: Committing,
) -> None:
    """The server looks twice for transactions that run: what begins and is logged in between is not in the slot."""
    stream_reader = StreamReader(feed, T)
    with psycopg.connect(database_url) as first, ThreadPoolExecutor(1) as pool:
        waiting_for = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted AND transactionid = %s"
        )
        first_xid = _begin(first)
        attaching = pool.submit(stream_reader.subscribe)
        wait_until(lambda: bool(one(admin, waiting_for, first_xid)))
        writer.execute("BEGIN")
        second_xid = _begin(writer)
        first.rollback()
        wait_until(lambda: bool(one(admin, waiting_for, second_xid)))
        standby.stop()
        committing.run("INSERT INTO t VALUES (4, 'left out')")
        waits(admin)
        writer.execute("ROLLBACK")
        subscription = attaching.result(60)
    assert set(subscription.rejected) == {T}, "a comparison would miss the row"
    standby.go_on()
    wait_until(lambda: T in stream_reader.subscribe().newly_subscribed)
    assert one(admin, "SELECT count(*) FROM t") == 4


def _begin(connection: Admin) -> Any:
    return one(connection, "SELECT pg_current_xact_id()::xid")


def test_transaction_numbers_are_compared_across_their_wraparound(stream_options: StreamOptions) -> None:
    snapshot = Snapshot.parse("12884901890:12884901900:12884901890,12884901895")  # 3 * 2^32 + 2 .. 12
    assert snapshot.unfinished([2, 3, 7, 11, 12, 20]) == {2, 7, 12, 20}
    assert snapshot.unfinished([2**32 - 1, 2**31 + 20]) == set(), "of the epoch before"
    early = Snapshot.parse("4294967290:4294967295:")
    assert early.unfinished([4294967294, 4294967295, 0, 5]) == {4294967295, 0, 5}
