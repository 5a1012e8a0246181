"""A consumer in a thread, as a run of it would be, and what tests of following ask about the table that it follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import pytest

from embedd_dagster.catalog import cdc, environments, resyncs, tasks, vector_tables
from embedd_dagster.catalog.tables import CdcStreamRow
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.connectors.postgresql.pgvector.names import platform_vector_ref
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode, SyncMode
from embedd_dagster.engine.cdc.consumer import ConsumerOptions, run_consumer
from embedd_dagster.engine.cdc.report import CdcReport
from embedd_dagster.engine.runtime import Runtime

if TYPE_CHECKING:
    from tests.engine.conftest import Product

ONE_STORE = pytest.mark.parametrize("product", [Mode.PLATFORM], indirect=True, ids=["pgvector"])
"""Of what has nothing to do with stores."""
INSERT = "INSERT INTO products VALUES (%s, 'new', 'row', 'red', 1)"

PUBLIC = partial(platform_vector_ref, "public")


class RunningConsumer:
    """Follows one connection while the block lasts; what kept it from following is raised at the end."""

    def __init__(self, runtime: Runtime, connection_id: str) -> None:
        self.run_id = uuid4().hex
        self.log: list[str] = []
        self.options = ConsumerOptions()
        self.reports: list[CdcReport] = []
        self.reason: str | None = None
        self.error: BaseException | None = None
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(runtime, connection_id), daemon=True)

    def _run(self, runtime: Runtime, connection_id: str) -> None:
        try:
            self.reason = run_consumer(
                runtime,
                connection_id,
                self.run_id,
                log=self.log.append,
                report=self.reports.append,
                should_stop=self._told.is_set,
                options=self.options,
            )
        except BaseException as error:  # told when the block ends
            self.error = error

    def stop(self) -> None:
        """Tells it to end, and waits."""
        self._told.set()
        self.join()

    def join(self, within: float = 180) -> None:
        """Waits for its end."""
        self._thread.join(within)
        assert not self._thread.is_alive(), "the consumer does not end"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self.error is not None:
            raise self.error


def eventually(holds: Callable[[], object], within: float = 90) -> None:
    """Returns once it holds; fails with what it last said."""
    until = time.monotonic() + within
    while True:
        try:
            if holds():
                return
            failure = None
        except AssertionError as error:
            failure = error
        if time.monotonic() > until:
            raise failure or AssertionError("it does not come true")
        time.sleep(0.05)


def make_cdc(product: Product) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        table.sync_mode = SyncMode.CDC.value


def slots_of(product: Product) -> list[tuple[Any, ...]]:
    return product.sql("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")


def consumer_of(product: Product) -> RunningConsumer:
    return RunningConsumer(product.runtime, product.table().connection_id)


def feed_of(product: Product) -> CdcStreamRow | None:
    with product.runtime.catalog.transaction() as session:
        return cdc.find(session, product.table().connection_id)


def is_true(product: Product) -> Callable[[], bool]:
    def holds() -> bool:
        product.assert_true_to_source()
        return True

    return holds


def is_subscribed(product: Product) -> bool:
    return product.table().cdc.subscribed_since is not None


def run_owed(product: Product) -> int:
    """Runs the pending resyncs, as the reconcile sensor would; how many."""
    with product.runtime.catalog.transaction() as session:
        pending = resyncs.due(session, 10)
    for one in pending:
        product.run(TaskType.SYNC, **one.options, reason=one.reason)
    return len(pending)


def is_resync_pending(product: Product) -> bool:
    table = product.table()
    return table.cdc.resync_requested_seq > table.cdc.resync_completed_seq


def settled(product: Product) -> bool:
    """No resync is pending any more; what a sync has to do is done here."""
    run_owed(product)
    return not is_resync_pending(product)


class Meanwhile:
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

    def __enter__(self) -> Meanwhile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@contextmanager
def under_a_sync(product: Product) -> Iterator[None]:
    """A sync is at work, and does nothing; completed at the end."""
    task_id = product.add_task(TaskType.SYNC)
    with product.runtime.catalog.transaction() as session:
        tasks.claim(session, task_id, "run of the sync")
    yield
    with product.runtime.catalog.transaction() as session:
        tasks.complete(session, task_id, "run of the sync", tasks.EMPTY_PROGRESS)


def another_table(product: Product, source_table: str) -> Product:
    """A second cdc table of the same connection, nothing built yet."""
    product.sql(f"CREATE TABLE {source_table} (LIKE products INCLUDING ALL)")
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id)
        assert table is not None
        configuration = replace(table.configuration, source_table=source_table)
        environment = environments.get(session, table.org_id, table.environment_id)
        new = NewVectorTable(
            source_table,
            table.connection_id,
            configuration,
            product.mode,
            SyncMode.CDC,
            platform_name=PUBLIC,
        )
        return replace(product, vector_table_id=vector_tables.create(session, environment, new).id)
