"""Building a set and switching to it: what is embedded, what is reused, what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from embedd_dagster.catalog import failed_rows, shard_checkpoints, tasks, vector_sets, vector_tables
from embedd_dagster.connectors.postgresql.reader import PostgresTableReader
from embedd_dagster.core.rows import SourceRow
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.status import SyncStatus, TaskStatus, TaskType
from embedd_dagster.defs.stopping import WorkerStopped
from embedd_dagster.engine import backfill
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.task_run import RunOptions
from embedd_dagster.engine.teardown import drop_retired_sets, teardown
from embedd_dagster.errors import (
    CatalogUnavailable,
    EmbeddingRejected,
    EmbeddingUnavailable,
    MassDeleteRefused,
    NotReady,
    RunCancelled,
    RunSuperseded,
    SourceTableNotFound,
    SourceUnavailable,
    TooManyFailedRows,
    ValidationFailed,
)
from tests.engine.conftest import COLUMNS, Product
from tests.support.openai_server import POISON


def test_a_backfill_embeds_every_row_once_and_is_live(product: Product) -> None:
    report = product.run()
    assert (report.rows_read, report.rows_embedded, report.rows_failed) == (500, 500, 0)
    assert product.provider.stats()["texts"] == 500
    table = product.table()
    assert (table.sync_status, table.total_rows, table.synced_rows) == ("synced", 500, 500)
    assert product.latest_task().status == TaskStatus.COMPLETED
    product.assert_true_to_source()
    assert set(report.seconds) >= {"prepare", "load", "catch_up", "index", "verify", "swap"}


def test_the_live_set_answers(product: Product) -> None:
    with pytest.raises(NotReady):
        product.search("x")
    product.run()
    hits = product.search("title: product 42\nthe body of 42")
    assert hits[0].key == 42
    assert hits[0].similarity_score == pytest.approx(1.0, abs=1e-4)
    assert hits[0].metadata == {"category": "red", "price": 4.2}
    only = product.search("x", filters={"price": {"lte": 0.3}})
    assert {hit.key for hit in only} == {1, 2, 3}
    with pytest.raises(ValidationFailed):
        product.search("x", filters={"nothing": 1})


def test_duplicate_texts_cost_one_embedding(product: Product) -> None:
    product.sql("UPDATE products SET title = 'same', body = NULL WHERE id > 100")
    report = product.run()
    assert report.rows_read == 500
    assert (report.rows_embedded, report.rows_reused) == (101, 399)
    assert product.provider.stats()["texts"] == 101, "also where several batches hold the same text at one moment"
    product.assert_true_to_source()


def test_a_duplicate_far_behind_is_found_in_the_set(product: Product) -> None:
    """Without any room for vectors in memory, a text that was written is read back, not paid for again."""
    product.options = RunOptions(reuse_bytes=0)
    product.sql(
        "INSERT INTO products SELECT n, 'product ' || n - 1000, 'the body of ' || n - 1000, 'red', 1 "
        "FROM generate_series(1001, 1500) n"
    )
    product.provider.behave(latency_seconds=0.05)
    assert product.run().rows_read == 1000
    assert product.provider.stats()["texts"] == 500
    product.assert_true_to_source()


def test_rows_without_text_have_no_point(product: Product) -> None:
    product.sql("UPDATE products SET title = ' ', body = NULL WHERE id <= 10")
    report = product.run()
    assert report.rows_skipped == 10
    assert len(product.points()) == 490
    assert product.table().synced_rows == 490


def test_an_empty_table_is_synced_with_nothing(product: Product) -> None:
    product.sql("TRUNCATE products")
    assert product.run().rows_read == 0
    table = product.table()
    assert (table.sync_status, table.total_rows, table.synced_rows) == ("synced", 0, 0)
    assert product.search("anything") == []


def test_a_change_of_metadata_columns_embeds_nothing(product: Product) -> None:
    product.run()
    product.reconfigure(columns=COLUMNS[:3])
    assert product.table().sync_status == SyncStatus.PENDING_REBACKFILL
    before = product.provider.stats()["texts"]
    report = product.run(TaskType.REBACKFILL)
    assert (report.rows_embedded, report.rows_reused, report.version) == (0, 500, 2)
    assert product.provider.stats()["texts"] == before
    assert product.search("product 1")[0].metadata.keys() == {"category"}


def test_a_new_prefix_embeds_everything(product: Product) -> None:
    product.run()
    product.reconfigure(columns=(replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:]))
    assert product.run(TaskType.REBACKFILL).rows_embedded == 500


def test_other_dimensions_are_swapped_in(product: Product) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    product.run(TaskType.REBACKFILL)
    assert product.live_set().dimensions == 24
    assert product.search("title: product 7\nthe body of 7")[0].key == 7
    assert drop_retired_sets(product.runtime) == 1
    assert product.search("title: product 7\nthe body of 7")[0].key == 7


def test_a_poisoned_row_is_set_aside_and_the_rest_goes_on(product: Product) -> None:
    product.sql("UPDATE products SET body = %s WHERE id = 250", f"bad {POISON} bad")
    report = product.run()
    assert (report.rows_failed, report.rows_embedded) == (1, 499)
    assert 250 not in product.points()
    assert product.failed_keys() == [250]


def test_too_many_failures_stop_before_the_swap(product: Product) -> None:
    product.run()
    product.sql("UPDATE products SET body = body || %s WHERE id <= 50", POISON)
    product.reconfigure(columns=(replace(COLUMNS[0], name_prefix="item: "), *COLUMNS[1:]))
    with pytest.raises(TooManyFailedRows):
        product.run(TaskType.REBACKFILL)
    table = product.table()
    assert (table.sync_status, table.live_version) == (SyncStatus.ERROR, 1)
    assert "failed" in (table.last_error or "")
    assert product.search("title: product 42\nthe body of 42")[0].key == 42


def _stopped_by_long_rows(product: Product) -> None:
    """A first build that was stopped: the provider takes no text as long as those of fifty rows."""
    product.provider.behave(max_tokens=100)
    product.sql("UPDATE products SET body = repeat('word ', 200) || id WHERE id <= 50")
    with pytest.raises(TooManyFailedRows):
        product.run()


def test_a_build_that_failed_rows_stopped_goes_on_once_the_provider_is_mended(product: Product) -> None:
    _stopped_by_long_rows(product)
    product.provider.behave(max_tokens=300_000)
    product.run()
    assert (product.failed_keys(), product.table().live_version) == ([], 1)
    product.assert_true_to_source()
    assert product.provider.stats()["texts"] < 500 + 256, (
        "but for the batch at which it was stopped, nothing is paid for again"
    )


def test_columns_spelled_in_another_order_stay_with_their_values(product: Product) -> None:
    """A row hash is over the columns in their order: what was begun, and what is live, keeps its own."""
    _stopped_by_long_rows(product)
    title, body, *metadata = COLUMNS
    product.reconfigure(columns=(*reversed(metadata), title, body))
    product.provider.behave(max_tokens=300_000)
    product.run()
    assert product.table().live_version == 1
    assert product.provider.stats()["texts"] < 500 + 256
    product.reconfigure(columns=(body, *metadata, title))
    product.sql("UPDATE products SET price = 5 WHERE id = 42")
    assert product.table().sync_status == SyncStatus.SYNCED
    report = product.run(TaskType.SYNC)
    assert (report.rows_embedded, report.rows_read) == (0, 1)
    found = {hit.key: hit.metadata for hit in product.search("product", filters={"price": {"eq": 5}})}
    assert found == {42: {"category": "red", "price": 5.0}, 50: {"category": "blue", "price": 5.0}}


def test_a_build_that_failed_rows_stopped_goes_on_once_the_rows_are_mended_or_gone(product: Product) -> None:
    _stopped_by_long_rows(product)
    with pytest.raises(TooManyFailedRows):
        product.run()
    product.sql(
        """UPDATE products SET body = 'short' WHERE id <= 20;
        UPDATE products SET body = NULL, title = NULL WHERE id BETWEEN 21 AND 30;
        DELETE FROM products WHERE id BETWEEN 31 AND 50"""
    )
    product.run()
    assert product.failed_keys() == []
    assert (product.table().total_rows, product.table().synced_rows) == (480, 470)
    product.assert_true_to_source(without=range(21, 31))


def test_failed_rows_that_go_during_the_build_are_forgotten(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    product.sql("UPDATE products SET body = body || %s WHERE id BETWEEN 250 AND 252", POISON)
    _before(
        monkeypatch,
        "_catch_up",
        lambda: product.sql(
            "DELETE FROM products WHERE id = 250; UPDATE products SET title = '', body = '' WHERE id = 251"
        ),
    )
    product.run()
    assert product.failed_keys() == [252]
    assert (product.table().total_rows, product.table().synced_rows) == (499, 497)


def _before(monkeypatch: pytest.MonkeyPatch, stage: str, action: Callable[[], object]) -> None:
    """Has something happen when this part of a build begins."""
    original = getattr(backfill, stage)

    def staged(*arguments: Any) -> Any:
        action()
        return original(*arguments)

    monkeypatch.setattr(backfill, stage, staged)


@pytest.mark.parametrize("stage", ["_catch_up", "_verify"])
def test_a_source_emptied_during_a_rebackfill_is_not_mirrored(
    product: Product, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    if stage == "_verify":  # where counts differ, all is compared
        _before(monkeypatch, stage, lambda: product.sql("TRUNCATE products"))
        _before(monkeypatch, stage, lambda: _lose_a_point(product))
    else:
        _before(monkeypatch, stage, lambda: product.sql("TRUNCATE products"))
    with pytest.raises(MassDeleteRefused):
        product.run(TaskType.REBACKFILL)
    assert product.table().live_version == 1
    assert product.search("title: product 42\nthe body of 42")[0].key == 42


def _lose_a_point(product: Product) -> None:
    building = replace(product.live_set(), version=2, dimensions=24)
    with product.open_store() as store:
        store.delete(building, [1])


def test_a_catalog_that_is_away_for_a_moment_costs_no_attempt(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = iter([True, False, True])
    original = shard_checkpoints.record

    def checkpoint(*arguments: Any, **options: Any) -> None:
        if next(away, False):
            raise CatalogUnavailable("The catalog database does not answer.")
        original(*arguments, **options)

    monkeypatch.setattr(shard_checkpoints, "record", checkpoint)
    product.run()
    assert product.latest_task().attempts == 1
    assert "The catalog database does not answer. Retrying for up to 20 seconds." in product.log
    product.assert_true_to_source()


def test_any_number_of_restarts_costs_no_attempt(product: Product) -> None:
    """However many deployments fall into one long build: each time it goes on where it was."""

    def told_to_stop() -> bool:
        raise WorkerStopped("The process of the run was told to stop.")

    task_id = product.add_task()
    for _ in range(4):
        with pytest.raises(WorkerStopped):
            product.run_task(task_id, should_stop=told_to_stop)
        assert (product.task(task_id).status, product.task(task_id).attempts) == (TaskStatus.PENDING, 0)
    product.run_task(task_id)
    product.assert_true_to_source()


def test_what_is_given_up_does_not_say_that_it_is_tried_again(product: Product) -> None:
    product.runtime.settings.__dict__.update(outage_patience_seconds=0)
    product.provider.behave(fail_every=1, fail_status=503)
    task_id = product.add_task()
    for _ in range(3):
        with pytest.raises(EmbeddingUnavailable):
            product.run_task(task_id)
    assert product.task(task_id).status == TaskStatus.FAILED
    assert (product.table().last_error or "").endswith("Tried 3 times: start it again once the cause is fixed.")


def test_a_long_load_says_how_far_it_is(product: Product) -> None:
    product.options = RunOptions(report_seconds=0.2)
    product.provider.behave(latency_seconds=0.5)
    product.run()
    assert any(" of 500 rows, " in line for line in product.log)


def test_a_swap_that_is_cancelled_between_its_halves_is_taken_back(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    original = RunContext.record
    task_id = product.add_task(TaskType.REBACKFILL)

    def record(context: RunContext, action: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if action.__name__ == "mark_live":
            with product.runtime.catalog.transaction() as session:
                task = tasks.find(session, task_id, lock=True)
                assert task is not None
                tasks.request_cancel(session, task)
        return original(context, action, *arguments, **options)

    monkeypatch.setattr(RunContext, "record", record)
    with pytest.raises(RunCancelled):
        product.run_task(task_id)
    assert (product.table().live_version, product.published_dimensions()) == (1, 16)


def test_a_refused_key_is_permanent(product: Product) -> None:
    product.provider.behave(api_key="another")
    with pytest.raises(EmbeddingRejected):
        product.run()
    task = product.latest_task()
    assert (task.status, task.attempts) == (TaskStatus.FAILED, 1)
    assert product.table().sync_status == SyncStatus.ERROR


def test_a_missing_source_table_is_permanent_and_what_is_live_stays(product: Product) -> None:
    product.run()
    product.sql("DROP TABLE products")
    with pytest.raises(SourceTableNotFound):
        product.run(TaskType.REBACKFILL)
    assert product.table().sync_status == SyncStatus.ERROR
    assert product.search("product")


def test_a_halved_source_is_not_mirrored_without_a_word(product: Product) -> None:
    product.run()
    product.sql("DELETE FROM products WHERE id > 100")
    with pytest.raises(MassDeleteRefused):
        product.run(TaskType.REBACKFILL)
    product.run(TaskType.REBACKFILL, confirm_mass_delete=True)
    assert len(product.points()) == 100


def test_a_cancelled_run_leaves_what_was(product: Product) -> None:
    with pytest.raises(RunCancelled):
        product.run(should_stop=lambda: True)
    assert product.latest_task().status == TaskStatus.CANCELLED
    assert product.table().sync_status == SyncStatus.PENDING


def test_a_rebackfill_that_does_not_get_there_leaves_the_counts_of_what_is_live(product: Product) -> None:
    product.sql("UPDATE products SET title = '', body = NULL WHERE id = 1")
    product.run()
    product.provider.behave(latency_seconds=0.2)
    product.reconfigure(dimensions=24)
    before = product.provider.stats()["requests"]
    with pytest.raises(RunCancelled):
        product.run(TaskType.REBACKFILL, should_stop=lambda: product.provider.stats()["requests"] > before)
    table = product.table()
    assert (table.sync_status, table.total_rows, table.synced_rows) == (SyncStatus.PENDING_REBACKFILL, 500, 499)


def test_a_second_run_of_one_task_ends_without_harm(product: Product) -> None:
    task_id = product.add_task()
    product.run_task(task_id)
    with pytest.raises(RunSuperseded):
        product.run_task(task_id)
    assert product.task(task_id).status == TaskStatus.COMPLETED


def test_writers_on_the_source_during_the_build_are_caught_up(product: Product) -> None:
    """The provider is slow; the table changes under the build; what goes live has the changes."""
    import threading

    product.provider.behave(latency_seconds=0.5)
    changed = threading.Event()

    def write() -> None:
        while product.provider.stats()["requests"] == 0:
            pass
        product.sql(
            """UPDATE products SET body = 'changed' WHERE id IN (1, 500);
            DELETE FROM products WHERE id IN (2, 499);
            INSERT INTO products VALUES (-5, 'low', 'x', 'red', 1), (1000, 'high', 'x', 'red', 1)"""
        )
        changed.set()

    writer = threading.Thread(target=write)
    writer.start()
    product.run()
    writer.join()
    assert changed.is_set()
    product.assert_true_to_source()


def test_a_source_that_goes_away_in_the_middle_is_waited_for_and_read_on(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third page is lost on the way; what came before it is neither read nor embedded again."""
    product.sql("INSERT INTO products SELECT n, 'p ' || n, 'b', 'red', n FROM generate_series(501, 9000) n")
    product.options = RunOptions(page_rows=500)
    original = PostgresTableReader.read
    lost = 0

    def read(reader: PostgresTableReader, key_range: KeyRange, **limits: int) -> Iterator[list[SourceRow]]:
        nonlocal lost
        for number, page in enumerate(original(reader, key_range, **limits), start=1):
            if number == 3:
                lost += 1
                product.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'embedd' AND datname = current_database() AND state = 'idle'"
                )
                raise SourceUnavailable("The connection was lost.")
            yield page

    monkeypatch.setattr(PostgresTableReader, "read", read)
    report = product.run()
    assert lost >= 4
    assert (report.rows_read, report.rows_embedded) == (9000, 9000)
    product.assert_true_to_source()


def test_a_drop_that_was_killed_is_repeated(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    product.run(TaskType.REBACKFILL)
    with monkeypatch.context() as patch:
        patch.setattr(vector_sets, "forget", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            drop_retired_sets(product.runtime)
    assert drop_retired_sets(product.runtime) == 1
    assert drop_retired_sets(product.runtime) == 0
    assert product.search("title: product 7\nthe body of 7")[0].key == 7


@pytest.mark.parametrize(
    ("key_type", "values"),
    [
        ("text", "'k' || n"),
        ("varchar(20)", "'K ' || n"),
        ("uuid", "md5(n::text)::uuid"),
        ("numeric(12,3)", "n / 8.0"),
        ("bigint", "n * 10000000000"),
        ("date", "date '2020-01-01' + n"),
        ("timestamptz", "timestamptz '2020-01-01 00:00+00' + n * interval '1 second'"),
    ],
)
def test_any_single_column_key(product: Product, key_type: str, values: str) -> None:
    product.sql(
        f"""DROP TABLE products;
        CREATE TABLE products (id {key_type} PRIMARY KEY, title text, body text, category text, price numeric(10,2));
        INSERT INTO products SELECT {values}, 'product ' || n, 'b', 'red', 1 FROM generate_series(1, 50) n"""
    )
    product.run()
    assert len(product.points()) == 50
    product.assert_true_to_source()
    product.sql(
        """UPDATE products SET body = 'other' WHERE title IN ('product 7', 'product 9');
        DELETE FROM products WHERE title = 'product 8'"""
    )
    report = product.run(TaskType.SYNC)
    assert (report.rows_embedded, report.rows_deleted) == (2, 1)
    product.assert_true_to_source()


def test_rows_that_no_text_should_break(product: Product) -> None:
    product.sql(
        """UPDATE products SET title = ''  , body = '   ' WHERE id = 4;
        UPDATE products SET body = repeat(md5(id::text), 160000) WHERE id = 2;
        UPDATE products SET price = 'NaN' WHERE id = 3"""
    )
    report = product.run()
    assert report.rows_failed == 0
    assert (report.rows_truncated, report.rows_skipped) == (1, 1)
    product.assert_true_to_source(without={4})


def test_a_row_with_too_much_metadata_fails_and_the_others_are_live(product: Product) -> None:
    product.sql("UPDATE products SET category = repeat('x', 2 * 1024 * 1024) WHERE id = 42")
    report = product.run()
    assert (report.rows_read, report.rows_embedded, report.rows_failed) == (500, 499, 1)
    live = product.live_set()
    with product.runtime.catalog.transaction() as session:
        (failed,) = failed_rows.page(session, live.vector_table_id, 10, None).items
    assert (failed.key, failed.step, failed.code) == ("i:42", "compose", "metadata_too_large")
    assert "xxx" not in failed.message
    product.assert_true_to_source(without={42})
    product.sql("UPDATE products SET category = repeat('x', 1024 * 1024) WHERE id = 42")
    assert product.run(TaskType.SYNC).rows_embedded == 1
    product.assert_true_to_source()


def test_json_that_utf_8_cannot_hold_is_embedded_all_the_same(product: Product) -> None:
    product.sql(
        """ALTER TABLE products ALTER body TYPE json USING to_json(body);
        UPDATE products SET body = '{"lone surrogate": "\\ud83d", "nul": "a\\u0000b"}' WHERE id = 1"""
    )
    assert product.run().rows_failed == 0
    assert product.search("x", filters={"price": {"eq": 0.1}})[0].embedded_text.endswith(
        '{"lone surrogate":"\ufffd","nul":"a\\u0000b"}'
    )
    product.assert_true_to_source()


def test_teardown_leaves_nothing(product: Product) -> None:
    product.run()
    product.reconfigure(dimensions=24)
    product.run(TaskType.REBACKFILL)
    with product.runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, product.vector_table_id)
        assert endpoints is not None
        vector_tables.mark_deleted(endpoints.vector_table)
    assert teardown(product.runtime, product.vector_table_id)
    assert teardown(product.runtime, product.vector_table_id), "idempotent"
    with product.runtime.open_store(product.mode, endpoints.connection) as store:
        assert store.versions(product.vector_table_id) == []
