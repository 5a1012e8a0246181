"""Making a vector set equal to its source by fingerprints: the batch sync, and the last step of every build.

Digests are taken before rows are read, so that a change in between is seen again next time, never missed. Deletes are
planned only from reads that completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog import vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.vector_sets import RowFailure
from embedd_dagster.core.changes import plan_changes
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import SourceRow, TableDigest, VectorSet, digest_bits
from embedd_dagster.core.shards import in_chunks
from embedd_dagster.engine.pipeline import BatchOutcome, RowCounts, RowPipeline, process_in_order
from embedd_dagster.errors import MassDeleteRefused, RunSuperseded
from embedd_dagster.sources.base import PAGE_BYTES, TableReader

if TYPE_CHECKING:
    from embedd_dagster.engine.work import Work
    from embedd_dagster.stores.base import Store

T = TypeVar("T")

_ROWS_A_GROUP = 100_000
_KEYS_A_READ = 1_000
_MAX_BYTES_IN_FLIGHT = 64 * 2**20


class Writing(Protocol):
    """What writing rows needs of whoever does it: a task's run, or a follower."""

    @property
    def store(self) -> Store:
        """Where the points are."""
        ...

    def check(self) -> None:
        """Returns while the work may go on."""
        ...

    def patiently(self, action: Callable[[], T]) -> T:
        """The result of an idempotent action on an outside system, waited for while that is down."""
        ...

    def fenced(self) -> AbstractContextManager[Session]:
        """A catalog transaction that commits only while the work is this one's."""
        ...

    def record_failures(self, session: Session, vector_set: VectorSet, failures: list[RowFailure]) -> None:
        """Keeps failed rows."""
        ...


def refuse_mass_delete(work: Work, before: int, present: int) -> None:
    """Raises MassDeleteRefused where a source lost more than half of its rows and nobody confirmed that."""
    if present * 2 < before and not work.task.options.get("confirm_mass_delete"):
        raise MassDeleteRefused(
            f"The source has {present} rows, {before} at the last sync: that is not mirrored without a confirmation."
        )


def apply_changes(
    work: Work,
    reader: TableReader,
    pipeline: RowPipeline,
    vector_set: VectorSet,
    digest: TableDigest,
    buckets: Sequence[int] | None,
) -> RowCounts:
    """Makes these buckets of the set (None: all) equal to the source, and says what that took.

    Rows are compared in groups of buckets, so that memory does not grow with the table.
    """
    total = RowCounts()
    with work.runtime.catalog.transaction() as session:
        failed = vector_sets.failed_hashes(session, vector_set)
    retry_failed = bool(work.task.options.get("retry_failed"))
    for group in _bucket_groups(digest, buckets):
        plan = work.patiently(
            lambda group=group: plan_changes(  # type: ignore[misc]
                reader.fingerprints(digest.bits, group), work.store.fingerprints(vector_set, digest.bits, group)
            )
        )
        changed = [row.key for row in plan.changed if retry_failed or failed.get(encode_key(row.key)) != row.row_hash]
        total.add(write_keys(work, reader, pipeline, vector_set, changed))
        if plan.deleted:
            _delete(work, vector_set, plan.deleted)
            total.deleted += len(plan.deleted)
    return total


def _bucket_groups(digest: TableDigest, buckets: Sequence[int] | None) -> Iterator[list[int] | None]:
    bucket_count = 1 << digest.bits
    per_group = max(1, bucket_count * _ROWS_A_GROUP // max(digest.row_count, 1))
    if buckets is None and per_group >= bucket_count:
        yield None
        return
    for group in in_chunks(range(bucket_count) if buckets is None else buckets, per_group):
        yield list(group)


def write_keys(
    work: Writing, reader: TableReader, pipeline: RowPipeline, vector_set: VectorSet, keys: Sequence[Key]
) -> RowCounts:
    """Reads these rows again and writes them; keys whose row is gone, or has no text, lose their point."""
    total = RowCounts()
    if not keys:
        return total
    vanished: list[Key] = []

    def pages() -> Iterator[list[SourceRow]]:
        for chunk in in_chunks(keys, _KEYS_A_READ):
            absent = {encode_key(key): key for key in chunk}
            for page in work.patiently(lambda chunk=chunk: reader.read_keys(chunk, page_bytes=PAGE_BYTES)):  # type: ignore[misc]
                for row in page:
                    absent.pop(encode_key(row.key), None)
                yield page
            vanished.extend(absent.values())

    concurrency = pipeline.concurrency
    with ThreadPoolExecutor(concurrency, thread_name_prefix="sync") as executor:
        outcomes = process_in_order(
            executor,
            pipeline,
            pipeline.batches(pages()),
            max_batches=2 * concurrency,
            max_bytes=_MAX_BYTES_IN_FLIGHT,
            check=work.check,
        )
        for outcome in outcomes:
            _settle(work, vector_set, outcome)
            total.add(outcome.counts)
    if vanished:
        _delete(work, vector_set, vanished)
        total.deleted += len(vanished)
    return total


def _settle(work: Writing, vector_set: VectorSet, outcome: BatchOutcome) -> None:
    if outcome.without_point:
        work.patiently(lambda: work.store.delete(vector_set, outcome.without_point))
    with work.fenced() as session:
        work.record_failures(session, vector_set, outcome.failures)
        vector_sets.clear_failures(session, vector_set, outcome.written)


def _delete(work: Writing, vector_set: VectorSet, keys: list[Key]) -> None:
    work.check()
    work.patiently(lambda: work.store.delete(vector_set, keys))
    with work.fenced() as session:
        vector_sets.clear_failures(session, vector_set, keys)


def sync(work: Work) -> RowCounts:
    """Brings the live set to the source's present state. An unchanged table costs one query and reads nothing.

    Every so-manieth sync (`full_sync_every`) compares all rows whatever the digests say: so a store that was tampered
    with, or restored from a backup, comes back to the truth.
    """
    with work.runtime.catalog.transaction() as session:
        live = vector_sets.get(session, work.table.id, work.table.live_version or 0)
    vector_set = work.vector_set(live)
    pipeline = work.pipeline(live, [vector_set])
    reader = work.reader(pipeline.configuration)
    earlier = vector_sets.stored_digest(live)
    with work.stage("digest"):
        digest = work.patiently(lambda: reader.digest(earlier.bits if earlier else 0))
    if digest.row_count * 2 < (live.row_count or 0):
        # of a followed table, rows that went one by one are gone from the set as well
        stored = work.patiently(lambda: work.store.count(vector_set))
        refuse_mass_delete(work, min(live.row_count or 0, stored), digest.row_count)
    every = work.settings.full_sync_every
    is_full = bool(work.task.options.get("full")) or (every > 0 and work.table.syncs_since_full + 1 >= every)
    buckets = None if is_full or work.task.options.get("retry_failed") else digest.changed_buckets(earlier)
    wanted_bits = digest_bits(digest.row_count)
    if abs(wanted_bits - digest.bits) > 1:
        # the table has grown or shrunk much: from now on its digest has another size, which has to be taken before reading
        with work.stage("digest"):
            resized = work.patiently(lambda: reader.digest(wanted_bits))
    else:
        resized = digest
    counts = RowCounts()
    if buckets is None or buckets:
        work.log(
            "Comparing every row." if buckets is None else f"{len(buckets)} of {1 << digest.bits} buckets changed."
        )
        with work.stage("sync"):
            counts = apply_changes(work, reader, pipeline, vector_set, digest, buckets)
        work.progress.add(counts)
    point_count = work.patiently(lambda: work.store.count(vector_set)) if counts.read or counts.deleted else None
    with work.fenced() as session:
        row = vector_sets.get(session, live.vector_table_id, live.version)
        table = vector_tables.find(session, live.vector_table_id, lock=True)
        if table is None:
            raise RunSuperseded("The vector table is gone.")
        vector_sets.set_digest(row, resized)
        if point_count is not None:
            failed = vector_sets.count_failures(session, live.vector_table_id, live.version)
            row.skipped_count = digest.row_count - point_count - failed
            table.synced_rows = point_count
        table.total_rows = digest.row_count
        table.last_sync_at = now()
        table.syncs_since_full = 0 if buckets is None else table.syncs_since_full + 1
    return counts
