"""A run that was replaced while it was away wakes up with rows of yesterday: nothing of them is written.

Its heartbeat has not told it yet: it comes once in ten minutes here. So it was stopped, or slept with its machine.
"""

from __future__ import annotations

import threading

import pytest

from embedd_dagster.catalog import tasks
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.run import run_task
from embedd_dagster.errors import RunSuperseded
from tests.engine.conftest import Product
from tests.support.cdc_product import RunningConsumer, eventually, is_subscribed, is_true, settled

_ANSWER_SECONDS = 5.0


class _Run(threading.Thread):
    """A sync in a thread of its own."""

    def __init__(self, product: Product) -> None:
        super().__init__(daemon=True)
        self._product = product
        self.task_id = product.add_task(TaskType.SYNC)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._product.run_task(self.task_id)
        except RunSuperseded as error:
            self.error = error


def _wait_for_request(product: Product, before: int) -> None:
    eventually(lambda: product.provider.stats()["requests"] > before)
    product.provider.behave(latency_seconds=0)


def _bury(product: Product, task_id: str) -> None:
    """As the reconcile sensor does with a run that gives no heartbeat for too long."""
    with product.runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        assert task is not None
        tasks.fail(session, task, "Its run is gone.", retry=True)


def test_a_sync_that_was_replaced_writes_nothing(product: Product) -> None:
    product.run()
    product.runtime.settings.__dict__.update(heartbeat_seconds=600)
    before = product.provider.stats()["requests"]
    product.provider.behave(latency_seconds=_ANSWER_SECONDS)
    product.sql("UPDATE products SET body = 'yesterday' WHERE id = 1")
    replaced = _Run(product)
    replaced.start()
    _wait_for_request(product, before)
    _bury(product, replaced.task_id)
    product.sql("UPDATE products SET body = 'today' WHERE id = 1")
    product.run_task(replaced.task_id)
    assert replaced.is_alive(), "its provider was to answer after its successor's"
    replaced.join(90)
    assert isinstance(replaced.error, RunSuperseded)
    product.assert_true_to_source()


def test_a_consumer_that_was_replaced_writes_nothing(cdc_product: Product) -> None:
    product = cdc_product
    product.run()
    connection_id = product.table().connection_id
    product.runtime.settings.__dict__.update(heartbeat_seconds=600)
    with RunningConsumer(product.runtime, connection_id) as replaced:
        eventually(lambda: is_subscribed(product) and settled(product))
        before = product.provider.stats()["requests"]
        product.provider.behave(latency_seconds=_ANSWER_SECONDS)
        product.sql("UPDATE products SET body = 'yesterday' WHERE id = 1")
        _wait_for_request(product, before)
        product.runtime.settings.__dict__.update(follow_renew_seconds=0.01)
        with RunningConsumer(product.runtime, connection_id):
            product.sql("UPDATE products SET body = 'today' WHERE id = 1")
            eventually(is_true(product))
            assert replaced.reason is None, "its provider was to answer after its successor's"
            replaced.join()
            product.assert_true_to_source()
    assert replaced.run_id in (replaced.reason or "")


def test_a_backfill_that_was_replaced_publishes_nothing(product: Product) -> None:
    """Stopped before the swap, it would take the public name back from what was built since."""
    product.run()
    product.reconfigure(dimensions=24)
    product.runtime.settings.__dict__.update(heartbeat_seconds=600)
    task_id = product.add_task(TaskType.REBACKFILL)
    product.provider.behave(latency_seconds=0.1)

    def build_another(line: str) -> None:
        if line == "Stage swap begins.":
            _bury(product, task_id)
            product.reconfigure(dimensions=16)
            product.run_task(task_id)

    with pytest.raises(RunSuperseded):
        run_task(product.runtime, task_id, "replaced", log=build_another, should_stop=lambda: False)
    assert product.published_dimensions() == 16
    product.assert_true_to_source()
