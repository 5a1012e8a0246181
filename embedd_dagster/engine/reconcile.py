"""Makes a vector set equal to its source: what backfill, sync and CDC share.

Digests are taken before rows are read, so a change in between is seen again by the next sync, never missed. Deletes are
planned only from reads that completed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Final

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.core.changes import ChangePlan, plan_changes
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, SourceRow, TableDigest, VectorSet
from embedd_dagster.core.shards import in_chunks
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.pipeline import BatchOutcome, RowPipeline, process_in_order
from embedd_dagster.engine.task_run import TaskRun
from embedd_dagster.errors import MassDeleteRefused
from embedd_dagster.protocols.source import PAGE_BYTES, TableReader

_ROWS_PER_GROUP: Final = 100_000
_KEYS_PER_READ: Final = 1_000
_MAX_BYTES_IN_FLIGHT: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class MassDeleteGuard:
    """Keeps a source that only looks emptied from emptying the live set."""

    run: TaskRun
    live: VectorSetRow | None

    @property
    def known_rows(self) -> int:
        """How many rows the source had at the last sync."""
        return (self.live.row_count or 0) if self.live is not None else 0

    @property
    def is_off(self) -> bool:
        """Whether there is nothing to protect, or the user has confirmed the deletion."""
        return self.live is None or self.run.has_option("confirm_mass_delete")

    def check(self, present: int) -> None:
        """Raises MassDeleteRefused if the source has lost more than half of the live set's rows without confirmation."""
        before = self.known_rows
        if self.live is None or present * 2 >= before or self.is_off:
            return
        # CDC deletes rows one by one from the set, but does not update the row count of the last sync
        context = self.run.context
        before = min(before, context.retry(context.store.count, self.run.vector_set(self.live)))
        if present * 2 < before:
            raise MassDeleteRefused(
                f"The source has {present} rows, {before} at the last sync: that is not mirrored without a confirmation."
            )


def apply_changes(
    reader: TableReader,
    pipeline: RowPipeline,
    digest: TableDigest,
    buckets: Sequence[int] | None,
    guard: MassDeleteGuard,
) -> RowCounts:
    """Makes these buckets of the pipeline's set (None: all) equal to the source. Idempotent.

    Rows are compared in groups of buckets, so memory does not grow with the table. A failed row counts as stored: it is
    tried again when it has changed (or when `retry_failed` asks for it), and forgotten when it is gone. The guard also
    counts what would be deleted: a source that is emptied after its digest was taken is found that way.
    """
    context, vector_set = pipeline.context, pipeline.vector_set
    total = RowCounts()
    row_count = max(digest.row_count, guard.known_rows)
    most_deleted = None if guard.is_off else row_count // 2
    failed = failed_rows_by_bucket(guard.run, vector_set, digest.bits)
    for group in _bucket_groups(row_count, digest.bits, buckets):
        left_out = [row for bucket in (failed if group is None else group) for row in failed.get(bucket, ())]
        plan = context.retry(_compare, reader, context, vector_set, digest.bits, group, left_out)
        if most_deleted is not None and total.deleted + len(plan.deleted) > most_deleted:
            # the source was emptied after its digest, or the set has rows that the source never had (after a restore)
            guard.check(context.retry(reader.count))
            plan = context.retry(_compare, reader, context, vector_set, digest.bits, group, left_out)
        total.add(write_keys(reader, pipeline, [row.key for row in plan.changed]))
        if plan.deleted:
            _delete(context, vector_set, plan.deleted)
            total.deleted += len(plan.deleted)
    return total


def _compare(
    reader: TableReader,
    context: RunContext,
    vector_set: VectorSet,
    bits: int,
    group: list[int] | None,
    left_out: list[Fingerprint],
) -> ChangePlan:
    stored = context.store.fingerprints(vector_set, bits, group)
    return plan_changes(reader.fingerprints(bits, group), chain(left_out, stored))


def failed_rows_by_bucket(run: TaskRun, vector_set: VectorSet, bits: int) -> dict[int, list[Fingerprint]]:
    """The failed rows as they were when they failed, by bucket. With `retry_failed`, their hashes match no row."""
    with run.runtime.catalog.transaction() as session:
        rows = failed_rows.fingerprints(session, vector_set)
    if run.has_option("retry_failed"):
        rows = [row._replace(row_hash=~row.row_hash) for row in rows]
    by_bucket: dict[int, list[Fingerprint]] = {}
    for row in rows:
        by_bucket.setdefault(row.bucket >> (BUCKET_BITS - bits), []).append(row)
    return by_bucket


def _bucket_groups(row_count: int, bits: int, buckets: Sequence[int] | None) -> Iterator[list[int] | None]:
    bucket_count = 1 << bits
    per_group = max(1, bucket_count * _ROWS_PER_GROUP // max(row_count, 1))
    if buckets is None and per_group >= bucket_count:
        yield None
        return
    for group in in_chunks(range(bucket_count) if buckets is None else buckets, per_group):
        yield list(group)


def write_keys(reader: TableReader, pipeline: RowPipeline, keys: Sequence[Key]) -> RowCounts:
    """Reads these rows again and writes them; keys whose row is gone, or has no text, lose their points. Idempotent."""
    total = RowCounts()
    if not keys:
        return total
    context = pipeline.context
    vanished: list[Key] = []
    concurrency = pipeline.concurrency
    with ThreadPoolExecutor(concurrency, thread_name_prefix="sync") as executor:
        outcomes = process_in_order(
            executor,
            pipeline,
            pipeline.batches(_read_keys(context, reader, keys, vanished)),
            max_batches=2 * concurrency,
            max_bytes=_MAX_BYTES_IN_FLIGHT,
        )
        for outcome in outcomes:
            _record_outcome(context, pipeline.vector_set, outcome)
            total.add(outcome.counts)
    if vanished:
        _delete(context, pipeline.vector_set, vanished)
        total.deleted += len(vanished)
    return total


def _read_keys(
    context: RunContext, reader: TableReader, keys: Sequence[Key], vanished: list[Key]
) -> Iterator[list[SourceRow]]:
    """The rows of these keys; keys without a row are added to `vanished`."""
    for chunk in in_chunks(keys, _KEYS_PER_READ):
        absent = {encode_key(key): key for key in chunk}
        seen: set[str] = set()
        for page in context.retry(reader.read_keys, chunk, page_bytes=PAGE_BYTES):
            for row in page:
                encoded = encode_key(row.key)
                absent.pop(encoded, None)
                if encoded in seen:
                    context.retry(reader.check_keys)  # raises an error that names the key
                seen.add(encoded)
            yield page
        vanished.extend(absent.values())


def _record_outcome(context: RunContext, vector_set: VectorSet, outcome: BatchOutcome) -> None:
    if outcome.without_point:
        context.write_as_owner(context.store.delete, vector_set, outcome.without_point)
    context.record(_save_outcome, context, vector_set, outcome)


def _save_outcome(session: Session, context: RunContext, vector_set: VectorSet, outcome: BatchOutcome) -> None:
    failed = {failure.key for failure in outcome.failures}
    context.record_failures(session, vector_set, outcome.failures)
    stored = [*outcome.written, *(key for key in outcome.without_point if key not in failed)]
    failed_rows.clear(session, vector_set, stored)


def _delete(context: RunContext, vector_set: VectorSet, keys: list[Key]) -> None:
    context.check()
    context.write_as_owner(context.store.delete, vector_set, keys)
    context.record(failed_rows.clear, vector_set, keys)
