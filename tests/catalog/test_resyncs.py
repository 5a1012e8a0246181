"""A pending resync is completed by a sync, buffered changes by the consumer that holds them, and nothing twice."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from embedd_dagster.catalog import (
    cdc,
    connections,
    environments,
    failed_rows,
    resyncs,
    tasks,
    vector_sets,
    vector_tables,
)
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import SecretBox, new_encryption_key
from embedd_dagster.catalog.tables import CdcStreamRow, VectorSetRow, VectorTable
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.core.status import SyncStatus, TaskType, VectorSetState
from embedd_dagster.core.vector_table import Column, ColumnRole, Mode, SyncMode, VectorConfiguration


class _Table:
    """A CDC table with one pending resync and no buffered changes."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        configuration = VectorConfiguration("products", "id", (Column("title", ColumnRole.EMBEDDING),), "m", 8)
        with catalog.transaction() as session:
            environment = environments.ensure_defaults(session)
            box = SecretBox([new_encryption_key()])
            connection = connections.create(
                session, box, environment, name="c", provider="postgresql", mode="managed", credentials={}
            )
            session.flush()
            new = NewVectorTable("products", connection.id, configuration, Mode.MANAGED, SyncMode.CDC)
            table = vector_tables.create(session, environment, new)
            session.flush()
            live = VectorSetRow(
                vector_table_id=table.id,
                version=1,
                state=VectorSetState.BUILDING.value,
                config_version=1,
                configuration=configuration.to_json(),
                key_type="integer",
                created_at=now(),
            )
            session.add(live)
            session.flush()
            vector_sets.mark_live(session, table, live)
            table.sync_status = SyncStatus.SYNCED.value
            self.id = table.id
        self.request()

    def request(self, buffered_by: str | None = None) -> None:
        with self.catalog.transaction() as session:
            resyncs.request(session, [self.id], "Asked for.", buffered_by=buffered_by)

    def begin(self) -> str:
        """A sync that is at work."""
        with self.catalog.transaction() as session:
            table = vector_tables.find(session, self.id, lock=True)
            assert table is not None
            made = tasks.create(session, table, TaskType.SYNC, max_attempts=2)
            tasks.claim(session, made.id, "run of the task")
            return made.id

    def end(self, task_id: str, how: str) -> None:
        with self.catalog.transaction() as session:
            task = tasks.find(session, task_id, lock=True)
            assert task is not None
            if how == "completed":
                tasks.complete(session, task_id, "run of the task", tasks.EMPTY_PROGRESS)
            elif how == "cancelled":
                tasks.cancel(session, task)
            else:
                tasks.fail(session, task, "It failed.", retry=how == "put back")

    def settle(self) -> None:
        with self.catalog.transaction() as session:
            resyncs.clear_buffered(session, self.id, "consumer")

    @property
    def row(self) -> VectorTable:
        with self.catalog.transaction() as session:
            found = vector_tables.find(session, self.id)
            assert found is not None
            return found

    @property
    def pending_syncs(self) -> int:
        return self.row.cdc.resync_requested_seq - self.row.cdc.resync_completed_seq


@pytest.fixture
def table(database_url: str) -> Iterator[_Table]:
    upgrade(database_url)
    catalog = Catalog(database_url)
    yield _Table(catalog)
    catalog.close()


def test_what_is_noted_beside_the_sync_that_pays_is_the_consumers_to_settle(table: _Table) -> None:
    task_id = table.begin()
    table.request(buffered_by="consumer")
    table.request(buffered_by="consumer")
    assert table.row.cdc.buffered_by_run_id == "consumer"
    table.end(task_id, "completed")
    assert (table.pending_syncs, table.row.cdc.buffered_by_run_id) == (2, "consumer"), "no other sync is pending"
    table.settle()
    assert table.pending_syncs == 0


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_sync_that_does_not_complete_has_paid_nothing(table: _Table, how: str) -> None:
    task_id = table.begin()
    table.request(buffered_by="consumer")
    with table.catalog.transaction() as session:
        resyncs.record_buffered(session, {table.id: 1})
    table.end(task_id, how)
    assert table.row.cdc.changes_pending == 0, "also where its consumer is dead"
    table.settle()
    assert (table.pending_syncs, table.row.cdc.buffered_by_run_id) == (2, None)


@pytest.mark.parametrize("how", ["completed", "cancelled", "failed"])
def test_a_sync_that_is_tried_again_pays_what_was_asked_for_by_then(table: _Table, how: str) -> None:
    task_id = table.begin()
    table.request(buffered_by="consumer")
    table.end(task_id, "put back")
    table.request(buffered_by="consumer")
    if how != "cancelled":
        with table.catalog.transaction() as session:
            tasks.claim(session, task_id, "run of the task")
    table.end(task_id, how)
    table.settle()
    assert (table.pending_syncs, table.row.cdc.buffered_by_run_id) == (0 if how == "completed" else 3, None)


def test_what_is_asked_for_while_a_sync_waits_or_of_another_sync_is_not_held(table: _Table) -> None:
    table.request(buffered_by="consumer")
    assert table.row.cdc.buffered_by_run_id is None, "nothing is at work that would pay the first"
    task_id = table.begin()
    table.request()
    table.request(buffered_by="consumer")
    table.end(task_id, "completed")
    table.settle()
    assert (table.pending_syncs, table.row.cdc.buffered_by_run_id) == (2, None), "the sync may have read before"


def test_a_sync_that_fails_without_a_debt_leaves_the_consumer_what_it_holds(table: _Table) -> None:
    table.end(table.begin(), "completed")
    task_id = table.begin()
    table.request(buffered_by="consumer")
    table.end(task_id, "failed")
    assert table.row.cdc.buffered_by_run_id == "consumer"


def test_what_is_noted_at_the_moment_the_sync_fails_is_not_held(table: _Table) -> None:
    task_id = table.begin()
    noting = threading.Thread(target=table.request, kwargs={"buffered_by": "consumer"})
    with table.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        assert task is not None
        tasks.fail(session, task, "It failed.", retry=False)
        session.flush()
        noting.start()
        noting.join(0.5)
        assert noting.is_alive(), "it waits for what becomes of the sync"
    noting.join()
    table.settle()
    assert (table.pending_syncs, table.row.cdc.buffered_by_run_id) == (2, None)


def test_what_is_noted_at_the_moment_the_sync_begins_is_held(table: _Table) -> None:
    with table.catalog.transaction() as session:
        found = vector_tables.find(session, table.id)
        assert found is not None
        task_id = tasks.create(session, found, TaskType.SYNC, max_attempts=2).id
    noting = threading.Thread(target=table.request, kwargs={"buffered_by": "consumer"})
    with table.catalog.transaction() as session:
        tasks.claim(session, task_id, "run of the task")
        session.flush()
        noting.start()
        noting.join(0.5)
        assert noting.is_alive(), "it waits for what the sync pays"
    noting.join()
    table.end(task_id, "completed")
    assert table.row.cdc.buffered_by_run_id == "consumer"


def test_the_hundredth_bad_end_in_a_row_delays_like_the_tenth(table: _Table) -> None:
    with table.catalog.transaction() as session:
        connection_id = vector_tables.find(session, table.id).connection_id  # type: ignore[union-attr]
        feed = CdcStreamRow(connection_id=connection_id, name="f", failures=99, created_at=now())
        feed.dagster_run_id, feed.claimed_at = "run", now()
        session.add(feed)
    with table.catalog.transaction() as session:
        cdc.end(session, connection_id, "run", "The password is wrong.")
    with table.catalog.transaction() as session:
        ended = cdc.find(session, connection_id)
        assert ended is not None
        assert ended.next_start_at is not None
        assert timedelta(minutes=4) < ended.next_start_at - now() <= timedelta(minutes=5)


def test_a_row_whose_key_is_longer_than_an_index_takes_can_fail_and_be_cleared(table: _Table) -> None:
    key = "".join(hashlib.sha256(str(number).encode()).hexdigest() for number in range(80))  # 5 KB, not compressible
    failure = RowFailure(key, 1, 0, "embed", "refused", "The provider refused it.")
    with table.catalog.transaction() as session:
        vector_set = vector_sets.as_vector_set(vector_sets.get(session, table.id, 1), "products")
        for _attempt in range(2):
            failed_rows.record(session, vector_set, [failure])
        assert [found.key for found in failed_rows.fingerprints(session, vector_set)] == [key]
        assert [row.attempts for row in failed_rows.page(session, table.id, 10, None).items] == [2]
        failed_rows.clear(session, vector_set, [key])
        assert failed_rows.count(session, table.id, 1) == 0
