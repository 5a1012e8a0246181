"""What a task and its vector table show of a run: its stage, rows without text, and texts that were cut."""

from __future__ import annotations

from typing import Any

from embedd_dagster.catalog import table_details, tasks
from embedd_dagster.catalog.table_details import TableDetails
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.task_run import RunOptions
from tests.engine.conftest import Product, eventually


def _details(product: Product) -> TableDetails:
    with product.runtime.catalog.transaction() as session:
        return table_details.read(session, [product.vector_table_id])[product.vector_table_id]


def test_rows_without_text_and_cut_texts_are_counted_on_the_task_and_on_the_vector_table(product: Product) -> None:
    product.sql("UPDATE products SET title = NULL, body = NULL WHERE id <= 7")
    product.sql("UPDATE products SET body = repeat(md5('a'), 2000) WHERE id = 8")
    product.run()
    progress = product.latest_task().progress
    assert (progress["rows_skipped"], progress["rows_truncated"]) == (7, 1)
    assert _details(product) == TableDetails(500, 493, rows_skipped=7, rows_truncated=1, stage=None)
    product.sql("UPDATE products SET title = NULL, body = NULL WHERE id = 9")
    product.sql("UPDATE products SET body = repeat(md5('b'), 2000) WHERE id = 10")
    product.run(TaskType.SYNC)
    assert _details(product) == TableDetails(500, 492, rows_skipped=8, rows_truncated=2, stage=None)


def test_a_waiting_task_is_told_from_a_running_one_and_a_running_one_shows_its_stage(product: Product) -> None:
    task_id = product.add_task()
    assert tasks.shown_stage(product.task(task_id)) == _details(product).stage == "queued"
    with product.caught(task_id) as running:
        eventually(lambda: tasks.shown_stage(product.task(task_id)) == "load")
        assert _details(product).stage == "load"
    running.result(60)
    assert tasks.shown_stage(product.task(task_id)) is None


def test_the_index_stage_says_in_log_and_progress_how_far_it_is(product: Product, monkeypatch: Any) -> None:
    product.options = RunOptions(report_seconds=0)
    stages: list[Any] = []
    shown = tasks.heartbeat

    def heartbeat(session: Any, task_id: str, run_id: str, progress: Any) -> None:
        stages.append((progress["stage"], progress["rows_indexed"]))
        shown(session, task_id, run_id, progress)

    monkeypatch.setattr(tasks, "heartbeat", heartbeat)
    store_type = type(product.open_store())
    finish = store_type.finish_load

    def reporting(store: Any, vector_set: Any, report: Any) -> None:
        report(250, 500)
        eventually(lambda: ("index", 250) in stages)
        finish(store, vector_set, report)

    monkeypatch.setattr(store_type, "finish_load", reporting)
    product.run()
    assert ("index", 250) in stages
    assert "Indexing: 250 of 500 vectors." in product.log
