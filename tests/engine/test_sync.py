"""The batch sync: it costs what changed, not what exists."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import httpx
import numpy as np
import pytest

from embedd_dagster.catalog import failed_rows, vector_sets
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.connectors.postgresql.reader import PostgresTableReader
from embedd_dagster.core.rows import PointBatch, TableDigest
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.errors import MassDeleteRefused, VectorStoreRejected, VectorStoreUnavailable
from tests.engine.conftest import Product
from tests.support.openai_server import POISON


@pytest.fixture
def built(product: Product) -> Product:
    product.run()
    product.provider.reset()
    return product


def test_an_unchanged_table_is_not_read(built: Product) -> None:
    report = built.run(TaskType.SYNC)
    assert (report.rows_read, report.rows_embedded, report.rows_deleted) == (0, 0, 0)
    assert set(report.seconds) == {"digest"}
    assert built.provider.stats()["requests"] == 0


def test_only_what_changed_is_read_and_embedded(built: Product) -> None:
    built.sql(
        """UPDATE products SET body = 'new body' WHERE id IN (5, 6);
        UPDATE products SET price = 0 WHERE id IN (7, 8, 9);
        DELETE FROM products WHERE id IN (10, 11);
        INSERT INTO products VALUES (9001, 'fresh', 'row', 'blue', 3)"""
    )
    report = built.run(TaskType.SYNC)
    assert (report.rows_read, report.rows_embedded, report.rows_rewritten, report.rows_deleted) == (6, 3, 3, 2)
    assert built.provider.stats()["texts"] == 3
    built.assert_true_to_source()
    assert (built.table().total_rows, built.table().synced_rows) == (499, 499)
    assert {hit.key for hit in built.search("x", filters={"price": {"eq": 0}})} == {7, 8, 9}
    assert built.run(TaskType.SYNC).rows_read == 0


def test_a_row_that_lost_its_text_loses_its_point(built: Product) -> None:
    built.sql("UPDATE products SET title = NULL, body = '' WHERE id = 5")
    report = built.run(TaskType.SYNC)
    assert report.rows_skipped == 1
    assert 5 not in built.points()
    built.sql("UPDATE products SET body = 'back' WHERE id = 5")
    built.run(TaskType.SYNC)
    built.assert_true_to_source()


def test_a_key_that_changes_is_a_delete_and_an_insert_that_is_not_paid_for(built: Product) -> None:
    built.sql("UPDATE products SET id = 7777 WHERE id = 7")
    report = built.run(TaskType.SYNC)
    assert report.rows_deleted == 1
    built.assert_true_to_source()


def _tamper(built: Product) -> None:
    """Three points are of other rows, and nothing of ours has done it."""
    live = built.live_set()
    with built.open_store() as store:
        prints = [one for one in store.fingerprints(live, 0, None) if one.key in (1, 2, 3)]
        found = store.vectors(live, [one.key for one in prints])
        store.upsert(
            live,
            PointBatch(
                keys=[one.key for one in prints],
                texts=["tampered with"] * 3,
                metadata=[{}] * 3,
                row_hashes=[~one.row_hash for one in prints],
                text_hashes=[0] * 3,
                buckets=[one.bucket for one in prints],
                vectors=np.stack([found[one.key][1] for one in prints]),
            ),
        )


def test_a_full_sync_heals_a_store_that_was_tampered_with(built: Product) -> None:
    _tamper(built)
    assert built.run(TaskType.SYNC).rows_read == 0, "the source did not change"
    assert built.run(TaskType.SYNC, full=True).rows_read == 3
    built.assert_true_to_source()


def test_a_full_sync_heals_a_store_that_has_more_than_the_source_ever_had(built: Product) -> None:
    built.sql("INSERT INTO products SELECT n, 'more ' || n, 'x', 'red', 1 FROM generate_series(1000, 1999) n")
    built.run(TaskType.SYNC)
    built.sql("DELETE FROM products WHERE id >= 1000")
    row = _set_back(built)
    assert row.row_count == 500
    built.run(TaskType.SYNC, full=True)
    built.assert_true_to_source()


def _set_back(built: Product) -> VectorSetRow:
    """The catalog as it was before the other thousand came: a store that was restored from another time."""
    with built.runtime.catalog.transaction() as session:
        row = vector_sets.get(session, built.vector_table_id, 1)
        row.row_count = 500
        return row


def test_every_so_manieth_sync_heals_by_itself(built: Product) -> None:
    built.runtime.settings.__dict__["full_sync_every"] = 3
    _tamper(built)
    assert [built.run(TaskType.SYNC).rows_read for _ in range(2)] == [0, 0]
    assert built.run(TaskType.SYNC).rows_read > 0
    built.assert_true_to_source()
    assert built.run(TaskType.SYNC).rows_read == 0


def test_an_emptied_source_is_not_mirrored_without_a_word(built: Product) -> None:
    built.sql("TRUNCATE products")
    with pytest.raises(MassDeleteRefused):
        built.run(TaskType.SYNC)
    assert len(built.points()) == 500
    assert built.table().sync_status == SyncStatus.ERROR
    built.run(TaskType.SYNC, confirm_mass_delete=True)
    assert built.points() == {}
    assert built.table().sync_status == SyncStatus.SYNCED


def test_a_failed_row_is_tried_again_when_it_changed_or_on_demand(built: Product) -> None:
    built.sql("UPDATE products SET body = %s WHERE id = 9", POISON)
    assert built.run(TaskType.SYNC).rows_failed == 1
    assert 9 not in built.points(), "a stale answer is worse than none"
    built.sql("UPDATE products SET price = 1 WHERE id = 10")
    requests = built.provider.stats()["requests"]
    built.run(TaskType.SYNC, full=True)
    assert built.provider.stats()["requests"] == requests, "the same row is not sent again"
    assert built.run(TaskType.SYNC, retry_failed=True).rows_failed == 1
    built.sql("UPDATE products SET body = 'good' WHERE id = 9")
    assert built.run(TaskType.SYNC).rows_failed == 0
    built.assert_true_to_source()
    assert built.failed_keys() == []


def test_failed_rows_that_are_gone_or_have_no_text_any_more_are_forgotten(built: Product) -> None:
    built.sql("UPDATE products SET body = body || %s WHERE id IN (9, 10, 11)", POISON)
    assert built.run(TaskType.SYNC).rows_failed == 3
    built.sql("DELETE FROM products WHERE id = 9; UPDATE products SET title = '', body = '' WHERE id = 10")
    built.run(TaskType.SYNC)
    assert built.failed_keys() == [11]
    assert (built.table().total_rows, built.table().synced_rows) == (499, 497)


def test_failures_of_more_rows_than_a_statement_has_parameters_are_cleared(built: Product) -> None:
    built.sql("UPDATE products SET body = body || %s WHERE id = 9", POISON)
    built.run(TaskType.SYNC)
    with built.runtime.catalog.transaction() as session:
        failed_rows.clear(session, built.live_set(), range(70_000))
    assert built.failed_keys() == []


def _after_digest(monkeypatch: pytest.MonkeyPatch, nth: int, action: Callable[[], object]) -> None:
    """Has something happen right after the nth digest of the source was taken."""
    original, calls = PostgresTableReader.digest, count(1)

    def digest(reader: PostgresTableReader, bits: int) -> TableDigest:
        taken = original(reader, bits)
        if next(calls) == nth:
            action()
        return taken

    monkeypatch.setattr(PostgresTableReader, "digest", digest)


def test_a_source_that_is_emptied_while_it_is_read_is_not_mirrored(
    built: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    _after_digest(monkeypatch, 1, lambda: built.sql("TRUNCATE products"))
    with pytest.raises(MassDeleteRefused):
        built.run(TaskType.SYNC, full=True)
    assert len(built.points()) == 500


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_row_written_while_a_digest_gets_another_size_is_found(
    product: Product, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    product.sql("INSERT INTO products SELECT n, 'more ' || n, 'x', 'red', 1 FROM generate_series(501, 4000) n")
    product.run()
    assert product.live_row().digest_bits == 3
    with product.open_store() as store:
        kept = [row.key for row in store.fingerprints(product.live_set(), 3, [7])]
    product.sql("DELETE FROM products WHERE id <> ALL(%s)", kept)
    _after_digest(monkeypatch, nth, lambda: product.sql("UPDATE products SET body = 'late' WHERE id = %s", kept[0]))
    product.run(TaskType.SYNC, confirm_mass_delete=True)
    assert product.live_row().digest_bits != 3
    product.run(TaskType.SYNC)
    product.assert_true_to_source()


def test_a_table_that_grew_much_gets_a_larger_digest(built: Product) -> None:
    built.sql("INSERT INTO products SELECT n, 'more ' || n, 'x', 'red', 1 FROM generate_series(10000, 13000) n")
    built.run(TaskType.SYNC)
    built.assert_true_to_source()
    assert (built.live_row().digest_bits or 0) >= 2
    assert built.run(TaskType.SYNC).rows_read == 0
    built.sql("UPDATE products SET title = 'changed' WHERE id = 10500")
    assert built.run(TaskType.SYNC).rows_embedded == 1
    built.assert_true_to_source()


def _drop_live_set(product: Product) -> None:
    name = product.live_set().versioned_name
    if product.mode is Mode.PLATFORM:
        product.sql(f'DROP TABLE "embedd_{name}" CASCADE')
    else:
        httpx.delete(f"{product.runtime.settings.qdrant_url}/collections/{name}").raise_for_status()


def test_a_set_that_is_gone_is_told_and_built_anew(built: Product) -> None:
    """A store that lost its volume; a connection that leads to a copy of the database without our tables."""
    _drop_live_set(built)
    with pytest.raises(VectorStoreUnavailable) as unanswered:
        built.search("product 1")
    assert "start a backfill" in unanswered.value.resolution
    built.sql("UPDATE products SET body = 'changed' WHERE id = 1")
    with pytest.raises(VectorStoreRejected, match="are gone from the store"):
        built.run(TaskType.SYNC)
    assert built.table().sync_status == SyncStatus.ERROR
    built.run()
    built.assert_true_to_source()
    assert len(built.search("product 1")) == 10
