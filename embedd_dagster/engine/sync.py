"""Making a vector set equal to its source by fingerprints: the batch sync, and the last step of every build.

Digests are taken before rows are read, so that a change in between is seen again next time, never missed. Deletes are
planned only from reads that completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.core.changes import ChangePlan, plan_changes
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, SourceRow, TableDigest, VectorSet, digest_bits
from embedd_dagster.core.shards import in_chunks
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.origins import require_same_table
from embedd_dagster.engine.pipeline import BatchOutcome, RowCounts, RowPipeline, process_in_order
from embedd_dagster.errors import MassDeleteRefused, RunSuperseded, SourceRejected, VectorStoreRejected
from embedd_dagster.protocols.source import PAGE_BYTES, TableReader

if TYPE_CHECKING:
    from embedd_dagster.catalog.tables import VectorSetRow
    from embedd_dagster.engine.work import Work
    from embedd_dagster.protocols.store import Store

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

    def as_owner(self, write: Callable[[], T]) -> T:
        """The result of an idempotent write to the store, done only while the work is this one's."""
        ...

    def record(self, action: Callable[[Session], T]) -> T:
        """Does an idempotent action in a catalog transaction that commits only while the work is this one's."""
        ...

    def record_failures(self, session: Session, vector_set: VectorSet, failures: list[RowFailure]) -> None:
        """Keeps failed rows."""
        ...


def refuse_mass_delete(work: Work, live: VectorSetRow | None, present: int) -> None:
    """Raises MassDeleteRefused where a source has lost more than half of the live set's rows and nobody confirmed that."""
    before = _known_rows(live)
    if live is None or present * 2 >= before or _is_confirmed(work):
        return
    # of a followed table, rows that went one by one are gone from the set as well
    vector_set = work.vector_set(live)
    before = min(before, work.patiently(lambda: work.store.count(vector_set)))
    if present * 2 < before:
        raise MassDeleteRefused(
            f"The source has {present} rows, {before} at the last sync: that is not mirrored without a confirmation."
        )


def _is_confirmed(work: Work) -> bool:
    return bool(work.task.options.get("confirm_mass_delete"))


def _known_rows(live: VectorSetRow | None) -> int:
    return (live.row_count or 0) if live is not None else 0


def apply_changes(
    work: Work,
    reader: TableReader,
    pipeline: RowPipeline,
    vector_set: VectorSet,
    digest: TableDigest,
    buckets: Sequence[int] | None,
    live: VectorSetRow | None,
) -> RowCounts:
    """Makes these buckets of the set (None: all) equal to the source, and says what that took.

    Rows are compared in groups of buckets, so that memory does not grow with the table. A failed row counts as one that the
    store has: tried again when it has changed (or `retry_failed` asks for it), forgotten when it is gone. What `live` had
    is guarded: a source that is emptied after its digest was taken is found by what would be deleted.
    """
    total = RowCounts()
    row_count = max(digest.row_count, _known_rows(live))
    most_deleted = None if live is None or _is_confirmed(work) else row_count // 2
    failed = _failed_rows(work, vector_set, digest.bits)
    for group in _bucket_groups(row_count, digest.bits, buckets):
        left_out = [row for bucket in (failed if group is None else group) for row in failed.get(bucket, ())]

        def compare(group: list[int] | None = group, left_out: list[Fingerprint] = left_out) -> ChangePlan:
            stored = work.store.fingerprints(vector_set, digest.bits, group)
            return plan_changes(reader.fingerprints(digest.bits, group), chain(left_out, stored))

        plan = work.patiently(compare)
        if most_deleted is not None and total.deleted + len(plan.deleted) > most_deleted:
            # emptied since its digest was taken; or the set has what the source never had, as after a restore
            refuse_mass_delete(work, live, work.patiently(reader.count))
            plan = work.patiently(compare)
        total.add(write_keys(work, reader, pipeline, vector_set, [row.key for row in plan.changed]))
        if plan.deleted:
            _delete(work, vector_set, plan.deleted)
            total.deleted += len(plan.deleted)
    return total


def _failed_rows(work: Work, vector_set: VectorSet, bits: int) -> dict[int, list[Fingerprint]]:
    """The failed rows as they were when they failed, by bucket; those to be tried again with a hash no row has."""
    with work.runtime.catalog.transaction() as session:
        rows = failed_rows.fingerprints(session, vector_set)
    if work.task.options.get("retry_failed"):
        rows = [row._replace(row_hash=~row.row_hash) for row in rows]
    by_bucket: dict[int, list[Fingerprint]] = {}
    for row in rows:
        by_bucket.setdefault(row.bucket >> (BUCKET_BITS - bits), []).append(row)
    return by_bucket


def _bucket_groups(row_count: int, bits: int, buckets: Sequence[int] | None) -> Iterator[list[int] | None]:
    bucket_count = 1 << bits
    per_group = max(1, bucket_count * _ROWS_A_GROUP // max(row_count, 1))
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
            seen: set[str] = set()
            for page in work.patiently(lambda chunk=chunk: reader.read_keys(chunk, page_bytes=PAGE_BYTES)):  # type: ignore[misc]
                for row in page:
                    encoded = encode_key(row.key)
                    absent.pop(encoded, None)
                    if encoded in seen:
                        work.patiently(reader.check_keys)  # which names the key
                    seen.add(encoded)
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
        work.as_owner(lambda: work.store.delete(vector_set, outcome.without_point))
    failed = {failure.key for failure in outcome.failures}
    settled = [*outcome.written, *(key for key in outcome.without_point if key not in failed)]

    def save(session: Session) -> None:
        work.record_failures(session, vector_set, outcome.failures)
        failed_rows.clear(session, vector_set, settled)

    work.record(save)


def _delete(work: Writing, vector_set: VectorSet, keys: list[Key]) -> None:
    work.check()
    work.as_owner(lambda: work.store.delete(vector_set, keys))
    work.record(lambda session: failed_rows.clear(session, vector_set, keys))


def sync(work: Work) -> RowCounts:
    """Brings the live set to the source's present state. An unchanged table costs one query and reads nothing.

    Every so-manieth sync (`full_sync_every`) compares all rows whatever the digests say: so a store that was tampered
    with, or restored from a backup, comes back to the truth.
    """
    live = work.live_set()
    assert live is not None  # noqa: S101 - a table that was never built is not synced
    vector_set = work.vector_set(live)
    pipeline = work.pipeline(live, [vector_set])
    reader = work.reader(pipeline.configuration)
    require_same_table(reader, live, work.table.source_table)
    _require_key_type(work, reader, live)
    with work.stage("digest"):
        digest, following = _take_digests(work, reader, vector_sets.stored_digest(live))
    refuse_mass_delete(work, live, digest.row_count)
    buckets = _buckets_to_compare(work, vector_set, digest, vector_sets.stored_digest(live))
    counts = RowCounts()
    if buckets is None or buckets:
        work.log(
            "Comparing every row." if buckets is None else f"Comparing {len(buckets)} of {1 << digest.bits} buckets."
        )
        with work.stage("sync"), _naming_a_set_that_is_gone(work, live):
            counts = apply_changes(work, reader, pipeline, vector_set, digest, buckets, live)
        work.progress.add(counts)
    point_count = work.patiently(lambda: work.store.count(vector_set)) if counts.read or counts.deleted else None

    def save(session: Session) -> None:
        row = vector_sets.get(session, live.vector_table_id, live.version)
        table = vector_tables.find(session, live.vector_table_id, lock=True)
        if table is None:
            raise RunSuperseded("The vector table is gone.")
        vector_sets.set_digest(row, following)
        row.truncated_count = (row.truncated_count or 0) + counts.truncated
        row.source_origin = reader.origin
        if point_count is not None:
            failed = failed_rows.count(session, live.vector_table_id, live.version)
            row.skipped_count = digest.row_count - point_count - failed
            table.synced_rows = point_count
        table.total_rows = digest.row_count
        table.last_sync_at = now()
        table.syncs_since_full = 0 if buckets is None else table.syncs_since_full + 1

    work.record(save)
    return counts


def _require_key_type(work: Work, reader: TableReader, live: VectorSetRow) -> None:
    """Raises SourceRejected where the set keeps its keys in a column of another type than the source's by now."""
    # a type outside of pg_catalog was once kept without its schema
    same_types = (None, reader.key_type, reader.key_type.rpartition(".")[2])
    if work.table.mode == Mode.PLATFORM and live.key_type not in same_types:
        raise SourceRejected(
            f"Primary key column {work.table.primary_key_column!r} is of type {reader.key_type} by now, and the vectors are"
            f" kept by {live.key_type}.",
            resolution="Start a backfill: it keeps them by the new type, and reuses what it can.",
        )


@contextmanager
def _naming_a_set_that_is_gone(work: Work, live: VectorSetRow) -> Iterator[None]:
    """A store that has lost the live set says so in its own terms; here it is said what to do about it."""
    try:
        yield
    except VectorStoreRejected:
        if work.has_set(live):
            raise
        raise VectorStoreRejected(
            f"The vectors of {work.table.name!r} are gone from the store.",
            resolution="Start a backfill: it builds them anew.",
        ) from None


def _take_digests(work: Work, reader: TableReader, earlier: TableDigest | None) -> tuple[TableDigest, TableDigest]:
    """The digest to compare by now, of the earlier one's size, and the one to keep for the next sync.

    They differ where the table has grown or shrunk much, so that another size suits it. The one to keep is taken first:
    what is committed between the two is compared now, and once more the next time.
    """
    bits = earlier.bits if earlier else 0
    digest = work.patiently(lambda: reader.digest(bits))
    wanted_bits = digest_bits(digest.row_count)
    if abs(wanted_bits - bits) <= 1:
        return digest, digest
    following = work.patiently(lambda: reader.digest(wanted_bits))
    return work.patiently(lambda: reader.digest(bits)), following


def _buckets_to_compare(
    work: Work, vector_set: VectorSet, digest: TableDigest, earlier: TableDigest | None
) -> list[int] | None:
    """Those that changed, and where failed rows are to be tried again theirs; None: all."""
    every = work.settings.full_sync_every
    if work.task.options.get("full") or (every > 0 and work.table.syncs_since_full + 1 >= every):
        return None
    changed = digest.changed_buckets(earlier)
    if changed is None or not work.task.options.get("retry_failed"):
        return changed
    return sorted({*changed, *_failed_rows(work, vector_set, digest.bits)})
