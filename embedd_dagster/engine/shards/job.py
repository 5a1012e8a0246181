"""Loading one shard: a plain function of picklable values, which may run in any process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, shard_checkpoints, vector_sets, vector_tables
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import SourceRow, VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.lease import TaskLease
from embedd_dagster.engine.memory import bulk_load
from embedd_dagster.engine.pipeline import RowPipeline, process_in_order
from embedd_dagster.engine.resources import ConnectionResources
from embedd_dagster.engine.retry import RetryPolicy
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.task_run import RunOptions
from embedd_dagster.errors import RunCancelled, SourceUnavailable, TooManyFailedRows
from embedd_dagster.protocols.source import PAGE_BYTES, TableReader
from embedd_dagster.settings import get_settings

_MAX_BYTES_IN_FLIGHT: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What is left to load of one shard, and for which run."""

    task_id: str
    run_id: str
    vector_set: VectorSet
    ordinal: int
    remaining: KeyRange
    counts: RowCounts
    """What earlier runs have loaded of it."""
    reuse_from: tuple[VectorSet, ...]
    """Sets whose vectors may be taken for unchanged texts."""
    shard_count: int
    """How many shards are loaded at the same time: they share the provider's concurrency, and memory."""
    total_rows: int
    """Of the whole table, as when the build began."""
    options: RunOptions


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a shard."""

    ordinal: int
    counts: RowCounts
    """Of the whole shard, with what earlier runs have loaded."""
    requests: int = 0
    """Requests to the provider by embedders that were opened for this shard alone."""
    retries: int = 0


@dataclass(frozen=True, slots=True)
class ShardResources:
    """What shards of one process share: texts that one shard has embedded are reused by the others."""

    context: RunContext
    reader: TableReader
    pipeline: RowPipeline
    workers: Executor
    """Processes batches."""
    max_failed_percent: float
    on_rows: Callable[[RowCounts, Key], object]
    """Called with the counts and the last key of each batch that was written."""


def load_shard(
    job: ShardJob,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = lambda _line: None,
) -> ShardResult:
    """Loads what is left of a shard in a context of its own, opened from the environment's settings. Idempotent.

    Every checkpoint is fenced by the run's lease in the catalog, which is also asked at every heartbeat: the shard stops
    with RunSuperseded or RunCancelled when the run loses it. Texts are reused within the process: a duplicate text costs
    one embedding per process, not one per run. Raises what reading, embedding and writing raise.
    """
    settings = get_settings()
    with Runtime.open(settings) as runtime, bulk_load():
        with runtime.catalog.transaction() as session:
            endpoints = vector_tables.load_endpoints(session, job.vector_set.vector_table_id)
            if endpoints is None:
                raise RunCancelled("The vector table was deleted.")
            row = vector_sets.get(session, job.vector_set.vector_table_id, job.vector_set.version)
            configuration = VectorConfiguration.from_json(row.configuration)
        lease = TaskLease(
            runtime.catalog,
            job.task_id,
            job.run_id,
            heartbeat_seconds=settings.heartbeat_seconds,
            progress=None,
            log=log,
            should_stop=should_stop,
        )
        outage_seconds = settings.outage_patience_seconds
        resources = ConnectionResources(
            runtime,
            endpoints.connection,
            outage_seconds=outage_seconds,
            check=lease.check,
            processes=job.shard_count,
        )
        context = RunContext(lease, resources, RetryPolicy(outage_seconds, lease.check, log), log)
        with closing(resources), closing(TextMemory(job.options.reuse_bytes)) as memory, _renewing(lease):
            embedder = resources.embedder(configuration, endpoints.embedding_provider)
            pipeline = RowPipeline(
                context, job.vector_set, configuration, embedder, reuse_from=job.reuse_from, memory=memory
            )
            with ThreadPoolExecutor(pipeline.concurrency, thread_name_prefix="batch") as workers:
                own = ShardResources(
                    context,
                    context.reader(configuration),
                    pipeline,
                    workers,
                    settings.max_failed_rows_percent,
                    lambda _counts, _last_key: None,
                )
                counts = load_with(own, job, batches_in_flight=2 * pipeline.concurrency)
            requests, retries = resources.embedder_counters()
    return ShardResult(job.ordinal, counts, requests, retries)


@contextmanager
def _renewing(lease: TaskLease) -> Iterator[None]:
    lease.start()
    try:
        yield
    finally:
        lease.stop()


def load_with(shared: ShardResources, job: ShardJob, *, batches_in_flight: int) -> RowCounts:
    """Loads what is left of a shard with resources that are open already; checkpoints after the writes. Idempotent."""
    context, vector_set = shared.context, job.vector_set
    counts = RowCounts()
    counts.add(job.counts)
    last_key: Key | None = None
    checkpointed_at = time.monotonic()
    outcomes = process_in_order(
        shared.workers,
        shared.pipeline,
        shared.pipeline.batches(_pages(context, shared.reader, job)),
        max_batches=max(2, batches_in_flight),
        max_bytes=_MAX_BYTES_IN_FLIGHT // job.shard_count,
    )
    for outcome in outcomes:
        counts.add(outcome.counts)
        last_key = outcome.last_key
        shared.on_rows(outcome.counts, last_key)
        instant = time.monotonic()
        if outcome.failures or instant - checkpointed_at >= job.options.checkpoint_seconds:
            context.record(_checkpoint, context, job, outcome.failures, last_key, counts, done=False)
            checkpointed_at = instant
        if outcome.failures:
            failed_count = context.record(failed_rows.count, vector_set.vector_table_id, vector_set.version)
            check_failed_rows(failed_count, job.total_rows, shared.max_failed_percent)
    context.record(_checkpoint, context, job, [], last_key, counts, done=True)
    return counts


def _checkpoint(
    session: Session,
    context: RunContext,
    job: ShardJob,
    failures: list[RowFailure],
    last_key: Key | None,
    counts: RowCounts,
    *,
    done: bool,
) -> None:
    context.record_failures(session, job.vector_set, failures)
    shard_checkpoints.record(
        session, job.vector_set, job.ordinal, last_key=last_key, done=done, counts=counts.to_json()
    )


def _pages(context: RunContext, reader: TableReader, job: ShardJob) -> Iterator[list[SourceRow]]:
    """The pages of a shard. After a lost connection it waits for the source and reads on after the last page."""
    remaining = job.remaining
    while True:
        try:
            for page in reader.read(remaining, page_rows=job.options.page_rows, page_bytes=PAGE_BYTES):
                yield page
                remaining = KeyRange(page[-1].key, remaining.upper)
        except SourceUnavailable as error:
            context.log(f"Reading is interrupted: {error}")
            context.retry(context.source.check)
        else:
            return


def are_too_many(failed_count: int, total_rows: int, max_percent: float) -> bool:
    """Whether so many rows failed that the fault is probably not the rows'."""
    return failed_count * 100 > max_percent * max(total_rows, 1)


def check_failed_rows(failed_count: int, total_rows: int, max_percent: float) -> None:
    """Raises TooManyFailedRows if more than `max_percent` of the rows have failed."""
    if are_too_many(failed_count, total_rows, max_percent):
        raise TooManyFailedRows(f"{failed_count} of {total_rows} rows failed, more than {max_percent:g} percent.")
