"""Shards in processes of their own: what they are given can be pickled, and a build in them is as one in threads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embedd_dagster.catalog import shard_checkpoints, tasks, vector_sets
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.rows import digest_bits
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.status import TaskStatus
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.shards import pools
from embedd_dagster.engine.shards.job import ShardJob, ShardResult, load_shard
from embedd_dagster.engine.task_run import RunOptions
from embedd_dagster.errors import RunCancelled, RunSuperseded, TooManyFailedRows
from embedd_dagster.protocols.source import Selection
from embedd_dagster.settings import ShardPoolKind, get_settings
from tests.engine.conftest import Product, eventually
from tests.support.killing import environment_of
from tests.support.openai_server import POISON
from tests.support.shard_logging import log_lines


@pytest.fixture
def in_processes(product: Product, monkeypatch: pytest.MonkeyPatch) -> Iterator[Product]:
    """Loads its shards in processes, which read the product's settings from the environment."""
    settings = {**environment_of(product.runtime.settings), "EMBEDD_HEARTBEAT_SECONDS": "0.2"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    product.runtime.settings.__dict__.update(shard_pool=ShardPoolKind.PROCESSES)
    get_settings.cache_clear()
    yield product
    get_settings.cache_clear()


ONE_STORE = pytest.mark.parametrize("product", [Mode.MANAGED], indirect=True, ids=["qdrant"])


def begin(product: Product, run_id: str) -> ShardJob:
    """A build of one shard, claimed and recorded but not loaded."""
    task_id = product.add_task()
    table = product.table()
    configuration = table.configuration
    selection = Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names)
    with product.runtime.open_source(product.connection()) as source:
        reader = source.reader(selection)
        digest = reader.digest(digest_bits(500))
    with product.runtime.catalog.transaction() as session:
        tasks.claim(session, task_id, run_id)
        row = vector_sets.begin_build(session, table, key_type=reader.key_type, digest=digest, ranges=[KeyRange()])
        vector_set = vector_sets.as_vector_set(row, table.storage_name)
    with product.open_store() as store:
        store.create(vector_set)
    return ShardJob(
        task_id=task_id,
        run_id=run_id,
        vector_set=vector_set,
        ordinal=0,
        remaining=KeyRange(),
        counts=RowCounts(),
        reuse_from=(),
        shard_count=1,
        total_rows=500,
        options=RunOptions(page_rows=100),
    )


def test_a_build_in_processes_is_as_one_in_threads(in_processes: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(*_arguments: Any, **_options: Any) -> RowCounts:
        raise AssertionError("The shard is loaded in the run's own process.")

    monkeypatch.setattr(pools, "load_with", in_this_process)
    in_processes.sql("UPDATE products SET title = NULL, body = NULL WHERE id = 7")
    in_processes.sql("UPDATE products SET body = body || %s WHERE id = 8", POISON)
    report = in_processes.run()
    assert (report.rows_read, report.rows_embedded, report.rows_skipped, report.rows_failed) == (500, 498, 1, 1)
    assert report.requests > 0
    assert in_processes.failed_keys() == [8]
    assert in_processes.latest_task().progress["rows_processed"] == 500
    assert any("1 rows failed at step embed" in line for line in in_processes.log)
    in_processes.assert_true_to_source(without=[7, 8])


@ONE_STORE
def test_an_error_in_a_process_ends_the_run_with_that_error(in_processes: Product) -> None:
    in_processes.sql("UPDATE products SET body = body || %s WHERE id > 50", POISON)
    with pytest.raises(TooManyFailedRows):
        in_processes.run()
    assert in_processes.latest_task().status == TaskStatus.FAILED


@ONE_STORE
def test_a_run_that_is_asked_to_stop_ends_its_processes(in_processes: Product) -> None:
    in_processes.provider.behave(held=True)
    stop = threading.Event()
    task_id = in_processes.add_task()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            in_processes.run_task(task_id, should_stop=stop.is_set)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        eventually(lambda: in_processes.provider.stats()["in_flight"] > 0)
        stop.set()
    finally:
        in_processes.provider.behave(held=False)
        thread.join(120)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [RunCancelled]
    assert in_processes.task(task_id).status == TaskStatus.CANCELLED


@ONE_STORE
def test_a_shard_is_loaded_from_values_that_can_be_pickled(in_processes: Product) -> None:
    job = begin(in_processes, "the run")
    result = pickle.loads(pickle.dumps(load_shard))(pickle.loads(pickle.dumps(job)))
    assert pickle.loads(pickle.dumps(result)) == result
    assert isinstance(result, ShardResult)
    assert (result.counts.read, result.counts.embedded) == (500, 500)
    with in_processes.runtime.catalog.transaction() as session:
        (shard,) = shard_checkpoints.read(session, job.vector_set.vector_table_id, job.vector_set.version)
    assert shard.done


@ONE_STORE
def test_a_shard_whose_run_was_replaced_stops_and_leaves_the_checkpoint(in_processes: Product) -> None:
    job = begin(in_processes, "the run")
    with in_processes.runtime.catalog.transaction() as session:
        task = tasks.find(session, job.task_id, lock=True)
        assert task is not None
        task.dagster_run_id = "its successor"
    with pytest.raises(RunSuperseded):
        load_shard(job)
    with in_processes.runtime.catalog.transaction() as session:
        (shard,) = shard_checkpoints.read(session, job.vector_set.vector_table_id, job.vector_set.version)
    assert (shard.done, shard.counts) == (False, {})
    with in_processes.open_store() as store:
        assert store.count(job.vector_set) == 0


def test_a_process_that_logs_more_than_a_pipe_holds_while_the_pool_ends_is_heard() -> None:
    lines: list[str] = []
    with pools.ProcessShardPool(1, log=lines.append, show_progress=lambda: None) as pool:
        pool._executor.submit(log_lines, 300)
    assert len(lines) == 300
