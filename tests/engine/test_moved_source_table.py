"""A source table that was renamed: compared by digests under its new name, not embedded again."""

from __future__ import annotations

import pytest

from embedd_dagster.catalog import moved_tables, tasks, vector_tables
from embedd_dagster.core.status import TaskType
from embedd_dagster.errors import Conflict
from tests.engine.conftest import Product


def _move(product: Product, source_table: str, key_type: str | None = None) -> None:
    with product.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, product.environment_id, product.vector_table_id, lock=True)
        moved_tables.move(session, row, source_table, key_type or product.live_row().key_type or "")


def test_a_renamed_table_is_compared_and_not_embedded_again(product: Product) -> None:
    product.run()
    embedded, version = product.provider.stats()["texts"], product.table().live_version
    product.sql("ALTER TABLE products RENAME TO goods")
    try:
        _move(product, "goods")
        table = product.table()
        assert (table.source_table, table.live_version, table.sync_status) == ("goods", version, "synced")
        assert table.cdc.resync_requested_seq == table.cdc.resync_completed_seq + 1
        product.run(TaskType.SYNC)
        table = product.table()
        assert (table.live_version, table.sync_status, table.cdc.resync_requested_seq) == (
            version,
            "synced",
            table.cdc.resync_completed_seq,
        )
        assert product.provider.stats()["texts"] == embedded
        product.sql("UPDATE goods SET title = 'moved' WHERE id = (SELECT min(id) FROM goods)")
        product.run(TaskType.SYNC)
        assert product.provider.stats()["texts"] == embedded + 1
    finally:
        product.sql("ALTER TABLE goods RENAME TO products")


def test_a_table_cannot_be_moved_under_a_task_that_is_at_work(product: Product) -> None:
    product.run()
    task_id = product.add_task(TaskType.SYNC)
    with pytest.raises(Conflict) as refused:
        _move(product, "goods")
    assert refused.value.code == "backfill_in_progress"
    assert product.table().source_table == "products"
    with product.runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id, lock=True)
        assert task is not None
        tasks.request_cancel(session, task)


def test_a_table_whose_keys_are_of_another_type_is_built_again(product: Product) -> None:
    product.run()
    before = product.table().config_version
    _move(product, "goods", "uuid")
    table = product.table()
    assert (table.sync_status, table.config_version) == ("pending_rebackfill", before + 1)
