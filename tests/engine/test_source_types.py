"""Columns of the source that take another type: the primary key's, and those that are filtered by."""

from __future__ import annotations

import pytest

from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, Mode
from embedd_dagster.engine.estimate import estimate
from embedd_dagster.errors import RunCancelled, SourceRejected
from tests.engine.conftest import COLUMNS, Product
from tests.engine.test_control import cancel
from tests.support.cdc_product import RunningConsumer, consumer_of, eventually, is_subscribed, is_true, settled

PGVECTOR = pytest.mark.parametrize("product", [Mode.PLATFORM], indirect=True, ids=["pgvector"])


def _with_citext_keys(product: Product) -> None:
    """Whose case makes them other rows to us, and the same ones to the database."""
    product.sql(
        """CREATE EXTENSION IF NOT EXISTS citext; DROP TABLE products;
        CREATE TABLE products (id citext PRIMARY KEY, title text, body text, category text, price numeric(10,2));
        INSERT INTO products SELECT 'User' || n, 'product ' || n, 'the body of ' || n, 'red', n
        FROM generate_series(1, 20) n"""
    )


def test_keys_that_change_their_case_keep_their_points(product: Product) -> None:
    _with_citext_keys(product)
    product.run()
    product.sql("UPDATE products SET id = lower(id) WHERE title <> 'product 7'")
    would_be = estimate(product.runtime, product.table().environment_id, product.vector_table_id)
    assert (would_be.rows_reused, would_be.rows_to_embed) == (1, 19)
    product.run(TaskType.SYNC, confirm_mass_delete=True)
    product.assert_true_to_source()


@PGVECTOR
def test_keys_that_change_their_case_are_followed(cdc_product: Product) -> None:
    _with_citext_keys(cdc_product)
    cdc_product.run()
    with consumer_of(cdc_product):
        eventually(lambda: is_subscribed(cdc_product) and settled(cdc_product))
        cdc_product.sql("UPDATE products SET id = lower(id) WHERE id <= 'user15'")
        eventually(is_true(cdc_product))


def test_a_key_that_does_not_equal_itself(product: Product) -> None:
    """NaN is a value of numeric, and to PostgreSQL it equals itself."""
    product.sql(
        """DROP TABLE products;
        CREATE TABLE products (id numeric PRIMARY KEY, title text, body text, category text, price numeric(10,2));
        INSERT INTO products VALUES ('NaN', 'no number', 'b', 'red', 1)"""
    )
    assert product.run().point_count == 1
    would_be = estimate(product.runtime, product.table().environment_id, product.vector_table_id)
    assert (would_be.rows, would_be.sampled_rows) == (1, 1)
    product.sql("UPDATE products SET title = 'none'")
    assert product.run(TaskType.SYNC).rows_embedded == 1
    assert product.run(TaskType.SYNC, full=True).rows_embedded == 0


def test_an_integer_key_that_outgrows_its_type_costs_no_text(product: Product) -> None:
    product.run()
    before = product.provider.stats()["texts"]
    product.sql(
        "ALTER TABLE products ALTER id TYPE bigint; INSERT INTO products VALUES (3000000000, 'a', 'b', 'red', 1)"
    )
    if product.mode is Mode.PLATFORM:
        with pytest.raises(SourceRejected, match="is now of type bigint"):
            product.run(TaskType.SYNC)
        assert "Start a backfill" in (product.table().last_error or "")
        assert len(product.points()) == 500, "what is live stays live"
        product.run()
    else:
        product.run(TaskType.SYNC)
    product.assert_true_to_source()
    assert product.provider.stats()["texts"] == before + 1


@pytest.mark.parametrize("new_type", ["uuid USING gen_random_uuid()", "text USING 'p' || id"])
def test_a_backfill_takes_any_other_type_of_key(product: Product, new_type: str) -> None:
    product.run()
    product.sql(f"ALTER TABLE products ALTER id TYPE {new_type}")
    product.run()
    product.assert_true_to_source()
    product.sql("UPDATE products SET body = 'after it' WHERE title = 'product 3'")
    product.run(TaskType.SYNC)
    product.assert_true_to_source()


def test_a_text_key_that_becomes_a_uuid_loses_no_row(product: Product) -> None:
    product.sql(
        """DROP TABLE products;
        CREATE TABLE products (id text PRIMARY KEY, title text, body text, category text, price numeric(10,2));
        INSERT INTO products SELECT gen_random_uuid()::text, 'product ' || n, 'the body of ' || n, 'red', n
        FROM generate_series(1, 20) n"""
    )
    product.run()
    product.sql("ALTER TABLE products ALTER id TYPE uuid USING id::uuid; UPDATE products SET price = 7 WHERE price = 1")
    if product.mode is Mode.PLATFORM:
        with pytest.raises(SourceRejected, match="is now of type uuid"):
            product.run(TaskType.SYNC)
        with product.open_store() as store:
            assert store.count(product.live_set()) == 20
        product.run()
    else:
        product.run(TaskType.SYNC)
    product.assert_true_to_source()


def test_an_unfinished_build_of_another_type_of_key_is_begun_anew(product: Product) -> None:
    task_id = product.add_task()
    with product.caught(task_id) as running:
        cancel(product, task_id)
    with pytest.raises(RunCancelled):
        running.result(60)
    product.sql("ALTER TABLE products ALTER id TYPE uuid USING gen_random_uuid()")
    product.run()
    product.assert_true_to_source()


def test_a_column_whose_values_its_filter_cannot_hold_any_more_is_named(product: Product) -> None:
    product.sql("ALTER TABLE products ADD COLUMN active boolean; UPDATE products SET active = id % 2 = 0")
    product.reconfigure(columns=(*COLUMNS, Column("active", ColumnRole.METADATA, filter_type=FilterType.BOOLEAN)))
    product.run()
    product.sql("ALTER TABLE products ALTER active TYPE text USING active::text; UPDATE products SET category = 'x'")
    with pytest.raises(SourceRejected, match=r"'active'.*filter_type `boolean`"):
        product.run(TaskType.SYNC)
    table = product.table()
    assert (table.sync_status, "PUT /v1/vector-tables" in (table.last_error or "")) == (SyncStatus.ERROR, True)
    assert all(hit.metadata["active"] is (hit.key % 2 == 0) for hit in product.search("product 1"))
    product.reconfigure(columns=(*COLUMNS, Column("active", ColumnRole.METADATA, filter_type=FilterType.KEYWORD)))
    product.run()
    assert {hit.metadata["active"] for hit in product.search("product 1")} <= {"true", "false"}


@PGVECTOR
def test_such_a_column_stops_its_followed_table(followed: tuple[Product, RunningConsumer]) -> None:
    product, consumer = followed
    product.sql("ALTER TABLE products ALTER price TYPE text USING 'EUR ' || price; UPDATE products SET body = 'b'")
    eventually(lambda: "'price'" in (product.table().last_error or ""))
    assert consumer.error is None
    product.sql("ALTER TABLE products ALTER price TYPE numeric(10,2) USING substr(price, 5)::numeric")
    eventually(lambda: settled(product))
    eventually(is_true(product))
