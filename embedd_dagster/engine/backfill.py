"""Builds a vector set next to the live one, and swaps it in.

In order: a version and its shards are recorded with the source's digest → every shard is loaded → what changed in the
source meanwhile is caught up → the set is indexed → counts are compared → the store publishes it and the catalog marks
it live. Each step is idempotent, and the next run continues an unfinished build of the same configuration from its
checkpoints, so a run may die anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Final

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, shard_checkpoints, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.rows import TableDigest, VectorSet, digest_bits
from embedd_dagster.core.shards import in_chunks
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.memory import bulk_load
from embedd_dagster.engine.pipeline import RowPipeline
from embedd_dagster.engine.reconcile import MassDeleteGuard, apply_changes, write_keys
from embedd_dagster.engine.shards.job import ShardJob, ShardResources, ShardResult, are_too_many, check_failed_rows
from embedd_dagster.engine.shards.pools import ProcessShardPool, ShardPool, ThreadShardPool
from embedd_dagster.engine.task_run import TaskRun
from embedd_dagster.errors import EmbeddError, RunCancelled, VectorStoreRejected
from embedd_dagster.protocols.source import TableReader
from embedd_dagster.settings import ShardPoolKind

_POLL_SECONDS: Final = 1.0
_CATCH_UP_ROUNDS: Final = 5
_VERIFY_ROUNDS: Final = 3
_FAILED_ROWS_PER_TRY: Final = 1_000


def backfill(run: TaskRun) -> RowCounts:
    """Builds a new set of the present configuration, or continues an unfinished one, and makes it live."""
    context = run.context
    live = run.live_set()
    if live is not None and _went_live_before(run, live):
        context.log(f"An earlier attempt has made version {live.version} live, and died before it could record that.")
        return run.progress.counts
    reader = context.reader(run.table.configuration)
    guard = MassDeleteGuard(run, live)
    with run.stage("prepare"):
        context.retry(reader.check_keys)  # before paying for texts of rows that would replace each other
        row, resumed = _begin(run, reader, guard)
        vector_set = run.vector_set(row)
        context.write_as_owner(context.store.create, vector_set)
    reuse_from = _reusable_sets(run, row, live, resumed=resumed)
    pipeline = run.pipeline(row, reuse_from)
    if resumed:
        reader = context.reader(pipeline.configuration)  # the order of its columns may have changed since
        _retry_many_failures(run, reader, pipeline)
    with run.stage("load"), bulk_load():
        _load(run, reader, pipeline, tuple(reuse_from))
    with run.stage("catch_up"):
        digest = _catch_up(reader, pipeline, row, guard)
    check_failed_rows(_count_failures(run, vector_set), digest.row_count, run.settings.max_failed_rows_percent)
    with run.stage("index"):
        context.write_as_owner(context.store.finish_load, vector_set, _IndexReport(run))
    with run.stage("verify"):
        digest, point_count = _verify(reader, pipeline, guard, digest)
    with run.stage("swap"):
        _swap(run, reader, vector_set, live, digest, point_count)
    return run.progress.counts


class _IndexReport:
    """Shows in the log and in the task's progress how far the store's index is."""

    def __init__(self, run: TaskRun) -> None:
        self._run = run
        self._reported_at = time.monotonic()

    def __call__(self, indexed: int, total: int) -> None:
        """`indexed` of `total` vectors are in the index; may be called at any rate."""
        self._run.context.check()
        self._run.progress.rows_indexed = indexed
        instant = time.monotonic()
        if instant - self._reported_at >= self._run.options.report_seconds:
            self._reported_at = instant
            self._run.context.log(f"Indexing: {indexed:,} of {total:,} vectors.")
            self._run.lease.renew_soon()


def _went_live_before(run: TaskRun, live: VectorSetRow) -> bool:
    if run.task.attempts < 2 or live.config_version != run.table.config_version:
        return False
    return live.live_at is not None and run.task.started_at is not None and live.live_at > run.task.started_at


def _begin(run: TaskRun, reader: TableReader, guard: MassDeleteGuard) -> tuple[VectorSetRow, bool]:
    """The version to build, and whether an earlier run has begun it."""
    context, live = run.context, guard.live
    unfinished = context.record(vector_sets.find_unfinished, run.table.id)
    if (
        unfinished is not None
        and unfinished.config_version == run.table.config_version
        and unfinished.key_type == reader.key_type
    ):
        context.log(f"Continuing version {unfinished.version}, which an earlier run began.")
        run.progress.total_rows = unfinished.row_count or 0
        return unfinished, True
    # taken before any row is read: later changes are caught up before the swap
    row_count = context.retry(reader.count)
    digest = context.retry(reader.digest, digest_bits(row_count))
    guard.check(digest.row_count)
    if live is not None and unfinished is not None and run.has_set(live):
        # The abandoned build may already be published. Point the public name at the live set first: dropping the build
        # would drop the name with it.
        context.write_as_owner(context.store.publish, run.vector_set(live))
    ranges = context.retry(reader.split, run.settings.shard_count)
    run.progress.total_rows = digest.row_count
    with run.lease.fenced() as session:
        row = vector_sets.begin_build(session, run.table, key_type=reader.key_type, digest=digest, ranges=ranges)
    context.log(f"Building version {row.version}: {digest.row_count} rows in {len(ranges)} shards.")
    return row, False


def _reusable_sets(run: TaskRun, row: VectorSetRow, live: VectorSetRow | None, *, resumed: bool) -> list[VectorSet]:
    """Sets that may hold a row's vector: the live one if its model is the same, and this one if it is continued."""
    sets = [run.vector_set(row)] if resumed else []
    if live is not None and run.has_set(live):
        old, new = VectorConfiguration.from_json(live.configuration), VectorConfiguration.from_json(row.configuration)
        if (old.embedding_model, old.embedding_dimensions) == (new.embedding_model, new.embedding_dimensions):
            sets.append(run.vector_set(live))
    return sets


def _retry_many_failures(run: TaskRun, reader: TableReader, pipeline: RowPipeline) -> None:
    """Tries failed rows again if there were so many that the build was stopped, as long as some of them succeed.

    Somebody who starts such a build again has probably repaired the provider or the rows.
    """
    failed_count = _count_failures(run, pipeline.vector_set)
    if not are_too_many(failed_count, run.progress.total_rows, run.settings.max_failed_rows_percent):
        return
    with run.runtime.catalog.transaction() as session:
        failed = failed_rows.fingerprints(session, pipeline.vector_set)
    run.context.log(f"Trying {len(failed)} failed rows again.")
    for chunk in in_chunks([row.key for row in failed], _FAILED_ROWS_PER_TRY):
        counts = write_keys(reader, pipeline, chunk)
        run.caught_up.add(counts)
        if counts.failed == len(chunk):
            return


def _load(run: TaskRun, reader: TableReader, pipeline: RowPipeline, reuse_from: tuple[VectorSet, ...]) -> None:
    vector_set = pipeline.vector_set
    with run.runtime.catalog.transaction() as session:
        shards = shard_checkpoints.read(session, vector_set.vector_table_id, vector_set.version)
    run.progress.replace(shard.counts for shard in shards)
    open_shards = [shard for shard in shards if not shard.done]
    if not open_shards:
        return
    jobs = [
        ShardJob(
            task_id=run.task.id,
            run_id=run.run_id,
            vector_set=vector_set,
            ordinal=shard.ordinal,
            remaining=shard.remaining,
            counts=RowCounts(**shard.counts),
            reuse_from=reuse_from,
            shard_count=len(open_shards),
            total_rows=run.progress.total_rows,
            options=run.options,
        )
        for shard in open_shards
    ]
    with ExitStack() as closing, _open_pool(run, reader, pipeline, len(jobs), closing) as pool:
        try:
            results = _wait(run, pool, [pool.submit(job) for job in jobs])
        except BaseException as error:
            run.lease.stop_work(error)
            pool.stop()
            raise
    run.requests += sum(result.requests for result in results)
    run.retries += sum(result.retries for result in results)


def _open_pool(
    run: TaskRun, reader: TableReader, pipeline: RowPipeline, shard_count: int, closing: ExitStack
) -> ShardPool:
    """The pool of shards that the settings choose; what it needs is closed by `closing`, after the pool."""
    if run.settings.shard_pool is ShardPoolKind.PROCESSES:

        def show_progress() -> None:
            with run.runtime.catalog.transaction() as session:
                shards = shard_checkpoints.read(session, run.table.id, pipeline.vector_set.version)
            run.progress.replace((shard.counts for shard in shards), shards[0].remaining.lower)

        return ProcessShardPool(shard_count, log=run.context.log, show_progress=show_progress)
    workers = closing.enter_context(ThreadPoolExecutor(pipeline.concurrency, thread_name_prefix="batch"))
    percent = run.settings.max_failed_rows_percent
    return ThreadShardPool(
        ShardResources(run.context, reader, pipeline, workers, percent, run.progress.add), shard_count
    )


def _wait(run: TaskRun, pool: ShardPool, futures: Collection[Future[ShardResult]]) -> list[ShardResult]:
    """The results once all shards are loaded; meanwhile logs how far the load is. Raises the first error of a shard."""
    begun = reported_at = time.monotonic()
    rows_before = run.progress.counts.read
    poll_seconds = min(_POLL_SECONDS, run.options.report_seconds)
    while True:
        done, unfinished = wait(futures, timeout=poll_seconds, return_when=FIRST_EXCEPTION)
        failed = next((error for future in done if (error := future.exception()) is not None), None)
        if failed is not None:
            raise failed
        pool.poll()
        if not unfinished:
            return [future.result() for future in futures]
        run.context.check()
        instant = time.monotonic()
        if instant - reported_at >= run.options.report_seconds:
            reported_at = instant
            rows, total = run.progress.counts.read, max(run.progress.total_rows, run.progress.counts.read)
            rate = (rows - rows_before) / (instant - begun)
            left = f"about {timedelta(seconds=round((total - rows) / rate))} left" if rate else "waiting"
            run.context.log(f"{rows:,} of {total:,} rows, {rate:,.0f} rows/s, {left}.")


def _catch_up(reader: TableReader, pipeline: RowPipeline, row: VectorSetRow, guard: MassDeleteGuard) -> TableDigest:
    """Applies what changed since the build began, until nothing does or for some rounds; returns the digest reached."""
    run, context, vector_set = guard.run, pipeline.context, pipeline.vector_set
    digest = vector_sets.stored_digest(row)
    for _round in range(_CATCH_UP_ROUNDS):
        latest = context.retry(reader.digest, digest.bits if digest else 0)
        changed = latest.changed_buckets(digest)
        if digest is not None and changed == []:
            return digest
        guard.check(latest.row_count)
        context.log(f"Catching up {len(changed or [])} of {1 << latest.bits} buckets that changed during the build.")
        context.write_as_owner(context.store.index_buckets, vector_set)
        run.caught_up.add(apply_changes(reader, pipeline, latest, changed, guard))
        digest = latest
        context.record(_set_digest, vector_set, digest)
    return latest


def _set_digest(session: Session, vector_set: VectorSet, digest: TableDigest) -> None:
    vector_sets.set_digest(vector_sets.get(session, vector_set.vector_table_id, vector_set.version), digest)


def _count_failures(run: TaskRun, vector_set: VectorSet) -> int:
    with run.runtime.catalog.transaction() as session:
        return failed_rows.count(session, vector_set.vector_table_id, vector_set.version)


def _verify(
    reader: TableReader, pipeline: RowPipeline, guard: MassDeleteGuard, digest: TableDigest
) -> tuple[TableDigest, int]:
    """The digest and the number of rows with points of a set whose counts agree with the source.

    A difference is repaired by comparing every row. Raises VectorStoreRejected if that does not help although the source
    is quiet. If the source is written to all the time, the next sync applies what came after the digest.
    """
    run, context, vector_set = guard.run, pipeline.context, pipeline.vector_set
    skipped_count = run.progress.counts.skipped + run.caught_up.skipped
    for _round in range(_VERIFY_ROUNDS):
        point_count = context.retry(context.store.count, vector_set)
        failed_count = _count_failures(run, vector_set)
        if point_count == digest.row_count - skipped_count - failed_count:
            return digest, point_count
        context.log(
            f"{point_count} points for {digest.row_count} rows ({skipped_count} without text, {failed_count} failed): "
            "comparing every row."
        )
        digest = context.retry(reader.digest, digest.bits)
        guard.check(digest.row_count)
        compared = apply_changes(reader, pipeline, digest, None, guard)
        skipped_count = compared.skipped
        run.caught_up.add(compared)
    if context.retry(reader.digest, digest.bits).changed_buckets(digest) == []:
        context.retry(reader.check_keys)
        raise VectorStoreRejected(
            f"The built set has {point_count} points for {digest.row_count} rows.",
            resolution="Start the backfill again; if it happens again, look at the vector store's log.",
        )
    return digest, context.retry(context.store.count, vector_set)


def _swap(
    run: TaskRun,
    reader: TableReader,
    vector_set: VectorSet,
    live: VectorSetRow | None,
    digest: TableDigest,
    point_count: int,
) -> None:
    context = run.context

    def mark_live(session: Session) -> None:
        table = vector_tables.find(session, vector_set.vector_table_id, lock=True)
        if table is None or table.deleted_at is not None:
            return
        row = vector_sets.get(session, vector_set.vector_table_id, vector_set.version)
        row.skipped_count = (
            digest.row_count - point_count - failed_rows.count(session, vector_set.vector_table_id, vector_set.version)
        )
        row.truncated_count = run.progress.counts.truncated + run.caught_up.truncated
        vector_sets.set_digest(row, digest)
        row.source_origin = reader.origin
        vector_sets.mark_live(session, table, row)
        table.last_sync_at = now()
        table.total_rows, table.synced_rows = digest.row_count, point_count

    # the store first: if the run is killed between the two, both names point at complete sets, and the next run repeats this
    context.write_as_owner(context.store.publish, vector_set)
    try:
        context.record(mark_live)
    except RunCancelled:
        with suppress(EmbeddError):  # the next build does it as well
            if live is not None:
                context.store.publish(run.vector_set(live))
        raise
    context.log(f"Version {vector_set.version} is live with {point_count} points.")
