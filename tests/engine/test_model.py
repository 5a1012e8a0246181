"""Any interleaving of writes, changed configurations, syncs, builds, deaths and outages ends in the truth.

Hypothesis draws the steps; after them everything is let come to rest, and then the live set must equal what the source
holds, in the present configuration, and another sync must find nothing to do.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedd_dagster.catalog import tasks
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.engine import run
from embedd_dagster.errors import Conflict, VectorStoreUnavailable
from tests.engine.conftest import COLUMNS, DIMENSIONS, Product

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 40
CONFIGURATIONS = (
    {"columns": COLUMNS, "dimensions": DIMENSIONS},
    {"columns": COLUMNS[:3], "dimensions": DIMENSIONS},
    {"columns": (replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:]), "dimensions": DIMENSIONS},
    {"columns": COLUMNS, "dimensions": 24},
)
KEYS = st.integers(1, ROWS + 10)
METHODS = st.sampled_from(["create", "upsert", "delete", "fingerprints", "vectors", "finish_load", "count", "publish"])
STEPS = st.one_of(
    st.tuples(st.just("write"), KEYS, st.sampled_from(["a", "b", "c", ""])),
    st.tuples(st.just("price"), KEYS, st.integers(0, 5)),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("configure"), st.integers(0, len(CONFIGURATIONS) - 1)),
    st.tuples(st.just("sync"), st.booleans()),
    st.tuples(st.just("build")),
    st.tuples(st.just("die"), METHODS, st.integers(1, 3), st.booleans()),
    st.tuples(st.just("outage"), METHODS, st.integers(1, 3)),
)


class Killed(BaseException):
    """Stands for kill -9: nothing that would clean up runs (the real one is in test_crash.py)."""


@contextmanager
def _failing(product: Product, method: str, nth: int, error: type[BaseException]) -> Iterator[None]:
    """The store's method raises at its nth call."""
    owner: Any = QdrantStore if product.mode == "managed" else PgvectorStore
    original = getattr(owner, method)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error("down")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, wrapped)
        if error is Killed:
            patch.setattr(run, "_end", lambda *_args: None)
        yield


def _run(product: Product, task_type: TaskType, **options: Any) -> None:
    try:
        task_id = product.add_task(task_type, **options)
    except Conflict:
        return
    with suppress(Killed):
        product.run_task(task_id)
    with product.runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        if task is None or task.ended_at is not None:
            return
        tasks.fail(session, task, "The run died.", retry=True)
    product.run_task(task_id)


def _build(product: Product) -> None:
    _run(
        product,
        TaskType.BACKFILL if product.table().live_version is None else TaskType.REBACKFILL,
        confirm_mass_delete=True,
    )


def _take(product: Product, step: tuple[Any, ...]) -> None:
    match step:
        case ("write", key, body):
            product.sql(
                """INSERT INTO products VALUES (%s, %s, %s, 'red', 1)
                ON CONFLICT (id) DO UPDATE SET title = excluded.title, body = excluded.body""",
                key,
                None if body == "" else "t",
                body,
            )
        case ("price", key, price):
            product.sql("UPDATE products SET price = %s WHERE id = %s", price, key)
        case ("delete", key):
            product.sql("DELETE FROM products WHERE id = %s", key)
        case ("configure", index):
            product.reconfigure(**CONFIGURATIONS[index])  # type: ignore[arg-type]
        case ("sync", full):
            if product.table().live_version is not None:
                _run(product, TaskType.SYNC, full=full, confirm_mass_delete=True)
        case ("build",):
            _build(product)
        case ("die", method, nth, is_sync):
            with _failing(product, method, nth, Killed):
                _take(product, ("sync", True) if is_sync else ("build",))
        case ("outage", method, nth):
            with _failing(product, method, nth, VectorStoreUnavailable):
                _build(product)


@given(steps=st.lists(STEPS, min_size=2, max_size=10))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_everything_ends_in_the_truth(product: Product, steps: list[tuple[Any, ...]]) -> None:
    product.provider.reset()
    product.provider.behave(counts_texts=True)
    product.sql("TRUNCATE products")
    product.sql(f"INSERT INTO products SELECT n, 'product ' || n, 'b', 'red', n FROM generate_series(1, {ROWS}) n")
    product.renew()
    for step in steps:
        _take(product, step)
    if product.table().live_version is None or product.table().sync_status == SyncStatus.PENDING_REBACKFILL:
        _build(product)
    _run(product, TaskType.SYNC, confirm_mass_delete=True)
    table = product.table()
    without_text = {row[0] for row in product.sql("SELECT id FROM products WHERE title IS NULL AND body = ''")}
    product.assert_true_to_source(without=without_text)
    assert table.sync_status == SyncStatus.SYNCED
    assert product.live_set().dimensions == table.embedding_dimensions
    assert table.synced_rows == table.total_rows - len(without_text)
    stats = product.provider.stats()
    assert product.run(TaskType.SYNC).rows_read == 0
    assert product.provider.stats()["requests"] == stats["requests"]
    _assert_paid_once(stats["text_counts"], steps)


def _assert_paid_once(text_counts: dict[str, int], steps: list[tuple[Any, ...]]) -> None:
    """The text of a row that nobody touched is embedded once, and once more for each other model, and for what died."""
    touched = {step[1] for step in steps if step[0] in ("write", "delete")}
    allowed = 1 + sum(step[0] in ("configure", "die", "outage") for step in steps)
    for key in set(range(1, ROWS + 1)) - touched:
        for prefix in ("title", "item"):
            assert text_counts.get(f"{prefix}: product {key}\nb", 0) <= allowed
