"""A column that stops being a key: found before a text is paid for, and named."""

from __future__ import annotations

import pytest

from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.errors import SourceRejected
from tests.engine.conftest import Product

PGVECTOR = pytest.mark.parametrize("product", [Mode.PLATFORM], indirect=True, ids=["pgvector"])


@PGVECTOR
def test_a_backfill_over_repeated_keys_embeds_nothing_and_names_one(product: Product) -> None:
    product.sql(
        """ALTER TABLE products DROP CONSTRAINT products_pkey, ADD PRIMARY KEY (id, title);
        INSERT INTO products SELECT 17, 'another ' || n, 'body', 'red', n FROM generate_series(1, 3) n"""
    )
    with pytest.raises(SourceRejected, match="3 rows repeat another's value, such as '17'"):
        product.run()
    assert product.provider.stats()["texts"] == 0
    table = product.table()
    assert (table.sync_status, "such as '17'" in (table.last_error or "")) == (SyncStatus.ERROR, True)
    product.sql("DELETE FROM products WHERE title LIKE 'another %'")
    product.run()
    product.assert_true_to_source()


@PGVECTOR
def test_a_sync_that_meets_a_repeated_key_names_it_and_pays_nothing(product: Product) -> None:
    product.run()
    before = product.provider.stats()["texts"]
    product.sql(
        "ALTER TABLE products DROP CONSTRAINT products_pkey; INSERT INTO products VALUES (42, 'other', 'b', 'red', 1)"
    )
    with pytest.raises(SourceRejected, match="such as '42'"):
        product.run(TaskType.SYNC)
    assert product.provider.stats()["texts"] == before
    assert len(product.points()) == 500, "what is live stays live"
    product.sql("DELETE FROM products WHERE title = 'other'")
    product.run(TaskType.SYNC)
    product.assert_true_to_source()


@PGVECTOR
def test_rows_of_an_inheriting_table_with_the_parents_keys_are_refused(product: Product) -> None:
    product.sql("CREATE TABLE heirs () INHERITS (products); INSERT INTO heirs VALUES (5, 'heir', 'b', 'red', 1)")
    with pytest.raises(SourceRejected, match="such as '5'"):
        product.run()
    assert product.provider.stats()["texts"] == 0
    product.sql("UPDATE heirs SET id = 501")
    assert product.run().point_count == 501
