"""Building a vector set beside the live one, and the swap.

In order: a version and its shards are recorded with the source's digest → every shard is loaded → what changed in the
source meanwhile is caught up → the set is indexed → counts are compared → the store publishes it and the catalog marks
it live. Each step is idempotent and the next run takes up an unfinished build of the same configuration where its
checkpoints are, so a run may die anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, shard_checkpoints, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.catalog.shard_checkpoints import ShardState
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import SourceRow, TableDigest, VectorSet, digest_bits
from embedd_dagster.core.shards import KeyRange, in_chunks
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.memory import bulk_load
from embedd_dagster.engine.pipeline import RowCounts, RowPipeline, process_in_order
from embedd_dagster.engine.retry import retry_transient
from embedd_dagster.engine.sync import apply_changes, refuse_mass_delete, write_keys
from embedd_dagster.engine.work import Work
from embedd_dagster.errors import EmbeddError, RunCancelled, SourceUnavailable, TooManyFailedRows, VectorStoreRejected
from embedd_dagster.protocols.source import PAGE_BYTES, TableReader

_PAGE_ROWS = 2_000
_MAX_BYTES_IN_FLIGHT = 64 * 2**20
_CHECKPOINT_SECONDS = 1.0
_TELL_SECONDS = 10.0
_CATCH_UP_ROUNDS = 5
_VERIFY_ROUNDS = 3
_FAILED_ROWS_A_TRY = 1_000


def backfill(work: Work) -> RowCounts:
    """Builds a new set of the present configuration, or goes on with an unfinished one, and makes it live."""
    live = work.live_set()
    if live is not None and _went_live_before(work, live):
        work.log(f"Version {live.version} was made live by an earlier attempt, which died before it could say so.")
        return work.progress.counts
    reader = work.reader(work.table.configuration)
    with work.stage("prepare"):
        work.patiently(reader.check_keys)  # before a text is paid for that would replace another row's
        row, resumed = _begin(work, reader, live)
        vector_set = work.vector_set(row)
        work.as_owner(lambda: work.store.create(vector_set))
    pipeline = work.pipeline(row, _reusable_sets(work, row, live, resumed=resumed))
    if resumed:
        reader = work.reader(pipeline.configuration)  # its columns may stand in another order by now
        _retry_many_failures(work, reader, pipeline, vector_set)
    with work.stage("load"), bulk_load():
        _load(work, reader, pipeline, vector_set)
    with work.stage("catch_up"):
        digest = _catch_up(work, reader, pipeline, row, live)
    _refuse_many_failures(work, vector_set, digest.row_count)
    with work.stage("index"):
        report = _IndexReport(work)
        work.as_owner(lambda: work.store.finish_load(vector_set, report))
    with work.stage("verify"):
        digest, point_count = _verify(work, reader, pipeline, vector_set, live, digest)
    with work.stage("swap"):
        _swap(work, reader, vector_set, live, digest, point_count)
    return work.progress.counts


class _IndexReport:
    """Tells how far the store's index is, every ten seconds: in the log and in the task's progress."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._told_at = time.monotonic()

    def __call__(self, indexed: int, total: int) -> None:
        """`indexed` of `total` vectors are in the index; called as often as the store likes."""
        self._work.check()
        self._work.progress.rows_indexed = indexed
        instant = time.monotonic()
        if instant - self._told_at >= _TELL_SECONDS:
            self._told_at = instant
            self._work.log(f"Indexing: {indexed:,} of {total:,} vectors.")
            self._work.show_progress()


def _went_live_before(work: Work, live: VectorSetRow) -> bool:
    if work.task.attempts < 2 or live.config_version != work.table.config_version:
        return False
    return live.live_at is not None and work.task.started_at is not None and live.live_at > work.task.started_at


def _begin(work: Work, reader: TableReader, live: VectorSetRow | None) -> tuple[VectorSetRow, bool]:
    unfinished = work.record(lambda session: vector_sets.find_unfinished(session, work.table.id))
    if (
        unfinished is not None
        and unfinished.config_version == work.table.config_version
        and unfinished.key_type == reader.key_type
    ):
        work.log(f"Going on with version {unfinished.version}, which an earlier run began.")
        work.progress.total_rows = unfinished.row_count or 0
        return unfinished, True
    # taken before any row is read: what changes from here on is caught up before the swap
    row_count = work.patiently(reader.count)
    digest = work.patiently(lambda: reader.digest(digest_bits(row_count)))
    refuse_mass_delete(work, live, digest.row_count)
    if live is not None and unfinished is not None and work.has_set(live):
        # what is given up now may have been published before its run died; dropped, it would take the name along
        work.as_owner(lambda: work.store.publish(work.vector_set(live)))
    ranges = work.patiently(lambda: reader.split(work.settings.shard_count))
    work.progress.total_rows = digest.row_count
    with work.fenced() as session:
        row = vector_sets.begin_build(session, work.table, key_type=reader.key_type, digest=digest, ranges=ranges)
    work.log(f"Building version {row.version}: {digest.row_count} rows in {len(ranges)} shards.")
    return row, False


def _reusable_sets(work: Work, row: VectorSetRow, live: VectorSetRow | None, *, resumed: bool) -> list[VectorSet]:
    """Sets in which a row's vector may be found: the live one if its model is the same, and after a death this one."""
    sets = [work.vector_set(row)] if resumed else []
    if live is not None and work.has_set(live):
        old, new = VectorConfiguration.from_json(live.configuration), VectorConfiguration.from_json(row.configuration)
        if (old.embedding_model, old.embedding_dimensions) == (new.embedding_model, new.embedding_dimensions):
            sets.append(work.vector_set(live))
    return sets


def _retry_many_failures(work: Work, reader: TableReader, pipeline: RowPipeline, vector_set: VectorSet) -> None:
    """Tries failed rows again if there are so many that the build was stopped; as long as some of them succeed.

    Whoever starts such a build again has mended the provider, or the rows.
    """
    if not _are_many(work, _count_failures(work, vector_set), work.progress.total_rows):
        return
    with work.runtime.catalog.transaction() as session:
        failed = failed_rows.fingerprints(session, vector_set)
    work.log(f"Trying {len(failed)} failed rows again.")
    for chunk in in_chunks([row.key for row in failed], _FAILED_ROWS_A_TRY):
        counts = write_keys(work, reader, pipeline, vector_set, chunk)
        work.caught_up.add(counts)
        if counts.failed == len(chunk):
            return


def _load(work: Work, reader: TableReader, pipeline: RowPipeline, vector_set: VectorSet) -> None:
    with work.runtime.catalog.transaction() as session:
        shards = shard_checkpoints.read(session, vector_set.vector_table_id, vector_set.version)
    for shard in shards:
        work.progress.add(RowCounts(**shard.counts))
    open_shards = [shard for shard in shards if not shard.done]
    if not open_shards:
        return
    with (
        ThreadPoolExecutor(pipeline.concurrency, thread_name_prefix="batch") as workers,
        ThreadPoolExecutor(len(open_shards), thread_name_prefix="shard") as readers,
    ):
        futures = [
            readers.submit(_load_shard, work, reader, pipeline, vector_set, shard, workers, len(open_shards))
            for shard in open_shards
        ]
        done = _wait_and_tell(work, futures)
        failed = next((error for future in done if (error := future.exception()) is not None), None)
        if failed is not None:
            work.stop_others(failed)
            wait(futures)
            raise failed


def _wait_and_tell(work: Work, futures: Collection[Future[None]]) -> set[Future[None]]:
    """The futures that are done once all are, or one has failed; how far the load is by then is in the log now and then."""
    begun, rows_before = time.monotonic(), work.progress.counts.read
    while True:
        done, unfinished = wait(futures, timeout=_TELL_SECONDS, return_when=FIRST_EXCEPTION)
        if not unfinished or any(future.exception() for future in done):
            return done
        rows, total = work.progress.counts.read, max(work.progress.total_rows, work.progress.counts.read)
        rate = (rows - rows_before) / (time.monotonic() - begun)
        left = f"about {timedelta(seconds=round((total - rows) / rate))} left" if rate else "waiting"
        work.log(f"{rows:,} of {total:,} rows, {rate:,.0f} rows/s, {left}.")


def _load_shard(
    work: Work,
    reader: TableReader,
    pipeline: RowPipeline,
    vector_set: VectorSet,
    shard: ShardState,
    workers: Executor,
    shard_count: int,
) -> None:
    """Loads what is left of one shard, checkpointing behind the writes at most once a second."""
    counts = RowCounts(**shard.counts)
    last_key: Key | None = None
    checkpointed_at = time.monotonic()

    def checkpoint(failures: list[RowFailure], *, done: bool) -> None:
        def save(session: Session) -> None:
            work.record_failures(session, vector_set, failures)
            shard_checkpoints.record(
                session, vector_set, shard.ordinal, last_key=last_key, done=done, counts=counts.to_json()
            )

        work.record(save)

    outcomes = process_in_order(
        workers,
        pipeline,
        pipeline.batches(_pages(work, reader, shard.remaining)),
        max_batches=max(2, 2 * pipeline.concurrency // shard_count),
        max_bytes=_MAX_BYTES_IN_FLIGHT // shard_count,
        check=work.check,
    )
    for outcome in outcomes:
        counts.add(outcome.counts)
        last_key = outcome.last_key
        work.progress.add(outcome.counts, last_key)
        instant = time.monotonic()
        if outcome.failures or instant - checkpointed_at >= _CHECKPOINT_SECONDS:
            checkpoint(outcome.failures, done=False)
            checkpointed_at = instant
        if outcome.failures:
            _refuse_many_failures(work, vector_set, work.progress.total_rows)
    checkpoint([], done=True)


def _pages(work: Work, reader: TableReader, remaining: KeyRange) -> Iterator[list[SourceRow]]:
    """The pages of a range; a source that went away is waited for, and read on behind the last page."""
    while True:
        try:
            for page in reader.read(remaining, page_rows=_PAGE_ROWS, page_bytes=PAGE_BYTES):
                yield page
                remaining = KeyRange(page[-1].key, remaining.upper)
        except SourceUnavailable as error:
            work.log(f"Reading is interrupted: {error}")
            retry_transient(work.source.check, patience_seconds=work.settings.outage_patience_seconds, check=work.check)
        else:
            return


def _catch_up(
    work: Work, reader: TableReader, pipeline: RowPipeline, row: VectorSetRow, live: VectorSetRow | None
) -> TableDigest:
    """Brings what changed since the build began, until nothing does, or for some rounds; gives the digest reached."""
    vector_set = work.vector_set(row)
    digest = vector_sets.stored_digest(row)
    for _round in range(_CATCH_UP_ROUNDS):
        bits = digest.bits if digest else 0
        latest = work.patiently(lambda bits=bits: reader.digest(bits))  # type: ignore[misc]
        changed = latest.changed_buckets(digest)
        if digest is not None and changed == []:
            return digest
        refuse_mass_delete(work, live, latest.row_count)
        work.log(f"Catching up {len(changed or [])} of {1 << latest.bits} buckets that changed during the build.")
        work.as_owner(lambda: work.store.index_buckets(vector_set))
        work.caught_up.add(apply_changes(work, reader, pipeline, vector_set, latest, changed, live))
        digest = latest
        work.record(lambda session, digest=digest: _set_digest(session, vector_set, digest))  # type: ignore[misc]
    return latest


def _set_digest(session: Session, vector_set: VectorSet, digest: TableDigest) -> None:
    vector_sets.set_digest(vector_sets.get(session, vector_set.vector_table_id, vector_set.version), digest)


def _are_many(work: Work, failed_count: int, total_rows: int) -> bool:
    return failed_count * 100 > work.settings.max_failed_rows_percent * max(total_rows, 1)


def _refuse_many_failures(work: Work, vector_set: VectorSet, total_rows: int) -> None:
    failed_count = _count_failures(work, vector_set)
    if _are_many(work, failed_count, total_rows):
        percent = work.settings.max_failed_rows_percent
        raise TooManyFailedRows(f"{failed_count} of {total_rows} rows failed, more than {percent:g} percent.")


def _count_failures(work: Work, vector_set: VectorSet) -> int:
    with work.runtime.catalog.transaction() as session:
        return failed_rows.count(session, vector_set.vector_table_id, vector_set.version)


def _verify(
    work: Work,
    reader: TableReader,
    pipeline: RowPipeline,
    vector_set: VectorSet,
    live: VectorSetRow | None,
    digest: TableDigest,
) -> tuple[TableDigest, int]:
    """The digest and the number of points of a set whose counts agree with the source.

    A difference is mended by comparing every row. Raises VectorStoreRejected where that does not help although the
    source is quiet; where it is being written to all the time, the next sync brings what came after the digest.
    """
    skipped_count = work.progress.counts.skipped + work.caught_up.skipped
    for _round in range(_VERIFY_ROUNDS):
        point_count = work.patiently(lambda: work.store.count(vector_set))
        failed_count = _count_failures(work, vector_set)
        if point_count == digest.row_count - skipped_count - failed_count:
            return digest, point_count
        work.log(
            f"{point_count} points for {digest.row_count} rows ({skipped_count} without text, {failed_count} failed): "
            "comparing every row."
        )
        digest = work.patiently(lambda bits=digest.bits: reader.digest(bits))  # type: ignore[misc]
        refuse_mass_delete(work, live, digest.row_count)
        compared = apply_changes(work, reader, pipeline, vector_set, digest, None, live)
        skipped_count = compared.skipped
        work.caught_up.add(compared)
    if work.patiently(lambda: reader.digest(digest.bits)).changed_buckets(digest) == []:
        work.patiently(reader.check_keys)
        raise VectorStoreRejected(
            f"The built set has {point_count} points for {digest.row_count} rows.",
            resolution="Start the backfill again; if it happens again, look at the vector store's log.",
        )
    return digest, work.patiently(lambda: work.store.count(vector_set))


def _swap(
    work: Work,
    reader: TableReader,
    vector_set: VectorSet,
    live: VectorSetRow | None,
    digest: TableDigest,
    point_count: int,
) -> None:
    def mark_live(session: Session) -> None:
        table = vector_tables.find(session, vector_set.vector_table_id, lock=True)
        if table is None or table.deleted_at is not None:
            return
        row = vector_sets.get(session, vector_set.vector_table_id, vector_set.version)
        row.skipped_count = (
            digest.row_count - point_count - failed_rows.count(session, vector_set.vector_table_id, vector_set.version)
        )
        row.truncated_count = work.progress.counts.truncated + work.caught_up.truncated
        vector_sets.set_digest(row, digest)
        row.source_origin = reader.origin
        vector_sets.mark_live(session, table, row)
        table.last_sync_at = now()
        table.total_rows, table.synced_rows = digest.row_count, point_count

    # the store first: killed between the two, both faces still point at complete sets, and the next run repeats this
    work.as_owner(lambda: work.store.publish(vector_set))
    try:
        work.record(mark_live)
    except RunCancelled:
        with suppress(EmbeddError):  # the next build does it, too
            if live is not None:
                work.store.publish(work.vector_set(live))
        raise
    work.log(f"Version {vector_set.version} is live with {point_count} points.")
