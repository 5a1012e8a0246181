"""Any interleaving of writes, tasks, pauses and deaths under a consumer ends in the truth.

Hypothesis draws the steps; the consumer runs at the same time, is killed and is replaced. At rest, the live set
equals the source, no resync is pending, and a comparison of every row finds nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedd_dagster.catalog import tasks, vector_tables
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.engine.cdc.lease import CdcLease
from embedd_dagster.errors import Conflict, MassDeleteRefused, VectorStoreUnavailable
from tests.engine.conftest import COLUMNS, DIMENSIONS, Product
from tests.support.cdc_product import Meanwhile, RunningConsumer, eventually, is_subscribed, make_cdc, settled

ROWS = 40
KEYS = st.integers(1, ROWS + 10)
CONFIGURATIONS = (COLUMNS, (replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:]), COLUMNS[:3])
STEPS = st.one_of(
    st.tuples(st.just("write"), KEYS, st.sampled_from(["a", "b", ""])),
    st.tuples(st.just("price"), KEYS, st.integers(0, 5)),
    st.tuples(st.just("move"), KEYS, st.integers(100, 110)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("truncate")),
    st.tuples(st.just("configure"), st.integers(0, len(CONFIGURATIONS) - 1)),
    st.tuples(st.just("task"), st.booleans()),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("die")),
    st.tuples(st.just("outage"), st.sampled_from(["upsert", "delete", "vectors"])),
    st.tuples(st.just("wait")),
)


class Consumer:
    """A consumer that is replaced when it dies, as the sensor would."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._running: RunningConsumer | None = None
        self.start()

    def start(self) -> None:
        self._running = RunningConsumer(self._product.runtime, self._product.table().connection_id)
        self._running.__enter__()

    def keep_alive(self) -> None:
        """Another one where the last has ended: nothing was to be followed, or it was silent for too long."""
        assert self._running is not None
        if self._running.reason is not None:
            self.start()

    def die(self) -> None:
        """Ends without giving its feed up, and forgets what it had noted (the real kill -9 is in test_follow_crash.py)."""
        assert self._running is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CdcLease, "end", lambda lease, _error: lease.stop())
            self._running.stop()
        self.start()

    def stop(self) -> None:
        assert self._running is not None
        self._running.stop()
        if self._running.error is not None:
            raise self._running.error


@contextmanager
def _outage(product: Product, method: str) -> Iterator[None]:
    owner: Any = QdrantStore if product.mode == "managed" else PgvectorStore

    def down(*_args: Any, **_kwargs: Any) -> Any:
        raise VectorStoreUnavailable("down")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, down)
        yield


def _run(product: Product, *, sync: bool) -> None:
    live = product.table().live_version
    if sync and live is None:
        return
    task_type = TaskType.SYNC if sync else TaskType.BACKFILL if live is None else TaskType.REBACKFILL
    try:
        product.run(task_type, confirm_mass_delete=True)
    except Conflict:
        return


def _set_paused(product: Product, *, paused: bool) -> None:
    with product.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, product.vector_table_id, lock=True)
        assert table is not None
        if table.paused != paused and tasks.find_live(session, table.id) is None:
            (vector_tables.pause if paused else vector_tables.resume)(table)


STATEMENTS = {
    "write": """INSERT INTO products VALUES (%(key)s, %(title)s, %(value)s, 'red', 1)
        ON CONFLICT (id) DO UPDATE SET title = excluded.title, body = excluded.body""",
    "price": "UPDATE products SET price = %(value)s WHERE id = %(key)s",
    "move": "DELETE FROM products WHERE id = %(value)s; UPDATE products SET id = %(value)s WHERE id = %(key)s",
    "delete": "DELETE FROM products WHERE id = %(key)s",
    "truncate": "TRUNCATE products",
}


def _write(product: Product, name: str, key: int = 0, value: Any = None) -> None:
    with psycopg.connect(product.database_url, autocommit=True) as connection:
        title = None if value == "" else "t"
        for statement in STATEMENTS[name].split("; "):
            connection.execute(statement, {"key": key, "value": value, "title": title})


def _run_owed(product: Product) -> bool:
    """Whether no resync is pending; runs what is, as the reconcile sensor would.

    A sync that comes before the consumer has read a TRUNCATE is refused; the event brings the confirmation.
    """
    with suppress(MassDeleteRefused):
        return settled(product)
    return False


def _take(product: Product, consumer: Consumer, step: tuple[Any, ...]) -> None:
    if step[0] in STATEMENTS:
        _write(product, *step)
        return
    match step:
        case ("configure", index):
            product.reconfigure(columns=CONFIGURATIONS[index])
        case ("task", sync):
            product.provider.behave(latency_seconds=0.05)
            with Meanwhile(lambda: _run(product, sync=sync)) as running:
                product.sql("UPDATE products SET body = 'meanwhile' WHERE id % 7 = 0")
            assert running.error is None
            product.provider.behave(latency_seconds=0)
        case ("pause",):
            _set_paused(product, paused=True)
        case ("resume",):
            _set_paused(product, paused=False)
        case ("die",):
            consumer.die()
        case ("outage", method):
            with _outage(product, method):
                product.sql("UPDATE products SET body = 'in an outage' WHERE id % 5 = 0")
                time.sleep(0.5)  # longer than its timeout
        case ("wait",):
            consumer.keep_alive()
            _run_owed(product)


def _is_at_rest(product: Product, consumer: Consumer) -> bool:
    consumer.keep_alive()
    table = product.table()
    if table.live_version is None or table.sync_status == SyncStatus.PENDING_REBACKFILL:
        _run(product, sync=False)
    if not (_run_owed(product) and is_subscribed(product) and product.table().cdc.changes_pending == 0):
        return False
    without = {row[0] for row in product.sql("SELECT id FROM products WHERE title IS NULL AND body = ''")}
    product.assert_true_to_source(without=without)
    return True


@given(steps=st.lists(STEPS, min_size=3, max_size=12))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_everything_ends_in_the_truth(cdc_product: Product, steps: list[tuple[Any, ...]]) -> None:
    cdc_product.runtime.settings.__dict__.update(stale_after_seconds=0.3, follow_patience_seconds=0.3)
    cdc_product.provider.reset()
    cdc_product.provider.behave(counts_texts=True)
    cdc_product.sql("TRUNCATE products")
    cdc_product.sql(f"INSERT INTO products SELECT n, 'product ' || n, 'b', 'red', n FROM generate_series(1, {ROWS}) n")
    cdc_product.renew()
    make_cdc(cdc_product)
    cdc_product.reconfigure(dimensions=DIMENSIONS)
    consumer = Consumer(cdc_product)
    try:
        for step in steps:
            _take(cdc_product, consumer, step)
        _set_paused(cdc_product, paused=False)
        eventually(lambda: _is_at_rest(cdc_product, consumer))
        done = cdc_product.run(TaskType.SYNC, full=True)
        assert (done.rows_embedded, done.rows_rewritten, done.rows_deleted) == (0, 0, 0)
        _assert_paid_once(cdc_product.provider.stats()["text_counts"], steps)
    finally:
        consumer.stop()


def _assert_paid_once(text_counts: dict[str, int], steps: list[tuple[Any, ...]]) -> None:
    """The text of a row that nobody touched is embedded once, and once more for each other prefix, and for what died."""
    kinds = {step[0] for step in steps}
    touched = {key for step in steps if step[0] in STATEMENTS for key in step[1:]}
    allowed = 1 + sum(step[0] in ("configure", "die", "outage") for step in steps)
    for key in range(1, ROWS + 1):
        if key in touched or ("task" in kinds and key % 7 == 0) or ("outage" in kinds and key % 5 == 0):
            continue
        for prefix in ("title", "item"):
            assert text_counts.get(f"{prefix}: product {key}\nb", 0) <= allowed
