"""kill -9 at every stage: the next run ends as an undisturbed one would, and at most what was in flight is paid for twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedd_dagster.catalog import tasks
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.engine.teardown import drop_retired_sets
from embedd_dagster.errors import RunCancelled
from tests.engine.conftest import Product
from tests.support.killing import kill_at

VICTIM = Path(__file__).parents[1] / "support" / "run_and_die.py"
ROWS = 4000
TEXTS_IN_FLIGHT = 4 * 256  # the provider's concurrency, and the largest batch


def _run_until_killed(product: Product, task_id: str, point: str, nth: int = 1) -> None:
    kill_at(product.runtime.settings, VICTIM, task_id, "victim", point, str(nth))
    # what the reconcile sensor does when the heartbeat has stopped
    with product.runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        assert task is not None
        tasks.fail(session, task, "The run died.", retry=True)


@pytest.fixture
def large(product: Product) -> Product:
    product.sql(f"INSERT INTO products SELECT n, 'product ' || n, 'b', 'red', n FROM generate_series(501, {ROWS}) n")
    return product


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("before:create", 1),
        ("before:read", 1),
        ("after:embed", 4),
        ("before:upsert", 3),
        ("after:upsert", 6),
        ("before:checkpoint", 1),
        ("after:checkpoint", 1),
        ("before:catch_up", 1),
        ("before:index", 1),
        ("after:index", 1),
        ("before:publish", 1),
        ("after:publish", 1),
        ("after:mark_live", 1),
        ("before:complete", 1),
    ],
)
def test_a_killed_build_is_finished_by_the_next_run(large: Product, point: str, nth: int) -> None:
    task_id = large.add_task()
    _run_until_killed(large, task_id, point, nth)
    large.run_task(task_id)
    large.assert_true_to_source()
    table = large.table()
    assert (table.sync_status, table.synced_rows, table.live_version) == (SyncStatus.SYNCED, ROWS, 1)
    assert large.task(task_id).attempts == 2
    assert large.provider.stats()["texts"] <= ROWS + TEXTS_IN_FLIGHT
    assert large.search("title: product 42\nthe body of 42")[0].key == 42


def test_a_published_set_that_never_went_live_takes_no_name_along(product: Product) -> None:
    """Killed between the halves of the swap, then configured again: until that is live the name shows what is."""
    product.run()
    product.reconfigure(dimensions=24)
    task_id = product.add_task(TaskType.REBACKFILL)
    _run_until_killed(product, task_id, "after:publish")
    assert product.published_dimensions() == 24
    product.reconfigure(dimensions=32)
    begun = product.provider.stats()["requests"]
    with pytest.raises(RunCancelled):
        product.run_task(task_id, should_stop=lambda: product.provider.stats()["requests"] > begun)
    assert drop_retired_sets(product.runtime) == 1
    assert product.published_dimensions() == 16


@pytest.mark.parametrize("point", ["before:publish", "after:publish", "after:mark_live"])
def test_a_swap_killed_between_its_halves_never_serves_a_half_set(product: Product, point: str) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    task_id = product.add_task(TaskType.REBACKFILL)
    _run_until_killed(product, task_id, point)
    drop_retired_sets(product.runtime)
    assert product.search("title: product 42\nthe body of 42")[0].key == 42, "the old set answers"
    product.run_task(task_id)
    assert product.live_set().dimensions == 24
    drop_retired_sets(product.runtime)
    assert product.search("title: product 42\nthe body of 42")[0].key == 42
    product.assert_true_to_source()


def test_a_killed_sync_is_repeated(product: Product) -> None:
    product.run()
    product.sql("UPDATE products SET body = 'new' WHERE id <= 300; DELETE FROM products WHERE id > 450")
    task_id = product.add_task(TaskType.SYNC)
    _run_until_killed(product, task_id, "after:upsert")
    product.run_task(task_id)
    product.assert_true_to_source()
