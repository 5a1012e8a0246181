"""kill -9 of a consumer at every point: the next one is given the same changes again, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedd_dagster.catalog import cdc
from embedd_dagster.core.vector_table import Mode
from tests.engine.conftest import Product
from tests.support.cdc_product import RunningConsumer, eventually, is_resync_pending, is_subscribed, is_true, settled
from tests.support.killing import kill_at

VICTIM = Path(__file__).parents[2] / "support" / "consume_and_die.py"


@pytest.mark.parametrize(
    ("product", "point", "nth"),
    [  # each point on one of the stores: what dies is the consumer, and none of these points is the store's own
        (Mode.MANAGED, "before:subscribe", 1),
        (Mode.PLATFORM, "after:subscribe", 1),
        (Mode.MANAGED, "after:record", 1),
        (Mode.PLATFORM, "before:read", 1),
        (Mode.MANAGED, "before:write", 1),
        (Mode.PLATFORM, "after:embed", 1),
        (Mode.MANAGED, "before:upsert", 1),
        (Mode.PLATFORM, "after:upsert", 1),
        (Mode.MANAGED, "after:write", 1),
        (Mode.PLATFORM, "before:advance", 2),
        (Mode.MANAGED, "after:advance", 2),
        (Mode.PLATFORM, "before:confirm", 1),
        (Mode.MANAGED, "after:confirm", 1),
    ],
    indirect=["product"],
)
def test_a_killed_consumer_loses_nothing(cdc_product: Product, point: str, nth: int) -> None:
    cdc_product.runtime.settings.__dict__.update(stale_after_seconds=0.5)
    cdc_product.run()
    connection_id = cdc_product.table().connection_id
    if point.partition(":")[2] not in ("subscribe", "record"):
        # followed before, so that only what changes from here on is at stake
        with RunningConsumer(cdc_product.runtime, connection_id):
            eventually(lambda: is_subscribed(cdc_product) and settled(cdc_product))
    cdc_product.sql(
        """UPDATE products SET body = 'rewritten' WHERE id <= 40; DELETE FROM products WHERE id > 490;
        INSERT INTO products VALUES (1000, 'new', 'row', 'red', 1)"""
    )
    before = cdc_product.provider.stats()["texts"]
    kill_at(cdc_product.runtime.settings, VICTIM, connection_id, "victim", point, str(nth))
    assert _owner(cdc_product, connection_id) == "victim"
    eventually(lambda: _follows_to_the_end(cdc_product, connection_id))
    cdc_product.assert_true_to_source()
    assert cdc_product.provider.stats()["texts"] - before <= 2 * 41


def _owner(product: Product, connection_id: str) -> str | None:
    with product.runtime.catalog.transaction() as session:
        feed = cdc.find(session, connection_id)
        return feed.dagster_run_id if feed else None


def _follows_to_the_end(product: Product, connection_id: str) -> bool:
    """Whether a consumer could take over: until the victim's silence is long enough, it ends at once."""
    with RunningConsumer(product.runtime, connection_id) as consumer:
        eventually(lambda: consumer.reason is not None or _owner(product, connection_id) == consumer.run_id)
        if consumer.reason is not None:
            return False
        eventually(lambda: is_subscribed(product) and settled(product))
        eventually(is_true(product))
        assert not is_resync_pending(product)
    return True
