"""The sync task: brings the live vector set to the source's present state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import VectorSetRow
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.rows import TableDigest, VectorSet, digest_bits
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.origins import require_same_table
from embedd_dagster.engine.reconcile import MassDeleteGuard, apply_changes, failed_rows_by_bucket
from embedd_dagster.engine.task_run import TaskRun
from embedd_dagster.errors import RunSuperseded, SourceRejected, VectorStoreRejected
from embedd_dagster.protocols.source import TableReader


def sync(run: TaskRun) -> RowCounts:
    """Brings the live set to the source's present state. An unchanged table costs one query and reads no rows.

    Every Nth sync (`full_sync_every`) compares all rows, even if the digests match: that repairs a store that was changed
    by others or restored from a backup.
    """
    live = run.live_set()
    assert live is not None  # noqa: S101 - a table that was never built is not synced
    vector_set = run.vector_set(live)
    pipeline = run.pipeline(live, [vector_set])
    context = run.context
    reader = context.reader(pipeline.configuration)
    require_same_table(reader, live, run.table.source_table)
    _require_key_type(run, reader, live)
    guard = MassDeleteGuard(run, live)
    with run.stage("digest"):
        digest, next_digest = _take_digests(context, reader, vector_sets.stored_digest(live))
    guard.check(digest.row_count)
    buckets = _buckets_to_compare(run, vector_set, digest, vector_sets.stored_digest(live))
    counts = RowCounts()
    if buckets is None or buckets:
        context.log(
            "Comparing every row." if buckets is None else f"Comparing {len(buckets)} of {1 << digest.bits} buckets."
        )
        with run.stage("sync"), _explaining_a_lost_set(run, live):
            counts = apply_changes(reader, pipeline, digest, buckets, guard)
        run.progress.add(counts)
    point_count = context.retry(context.store.count, vector_set) if counts.read or counts.deleted else None

    def save(session: Session) -> None:
        row = vector_sets.get(session, live.vector_table_id, live.version)
        table = vector_tables.find(session, live.vector_table_id, lock=True)
        if table is None:
            raise RunSuperseded("The vector table is gone.")
        vector_sets.set_digest(row, next_digest)
        row.truncated_count = (row.truncated_count or 0) + counts.truncated
        row.source_origin = reader.origin
        if point_count is not None:
            failed = failed_rows.count(session, live.vector_table_id, live.version)
            row.skipped_count = digest.row_count - point_count - failed
            table.synced_rows = point_count
        table.total_rows = digest.row_count
        table.last_sync_at = now()
        table.syncs_since_full = 0 if buckets is None else table.syncs_since_full + 1

    context.record(save)
    return counts


def _require_key_type(run: TaskRun, reader: TableReader, live: VectorSetRow) -> None:
    """Raises SourceRejected if the set keeps its keys in a column of another type than the source has now."""
    # earlier versions kept a type outside of pg_catalog without its schema
    same_types = (None, reader.key_type, reader.key_type.rpartition(".")[2])
    if run.table.mode == Mode.PLATFORM and live.key_type not in same_types:
        raise SourceRejected(
            f"Primary key column {run.table.primary_key_column!r} is now of type {reader.key_type}, and the vectors are"
            f" kept by {live.key_type}.",
            resolution="Start a backfill: it keeps them by the new type, and reuses what it can.",
        )


@contextmanager
def _explaining_a_lost_set(run: TaskRun, live: VectorSetRow) -> Iterator[None]:
    """Replaces the store's error about a live set that it has lost by one that says what to do."""
    try:
        yield
    except VectorStoreRejected:
        if run.has_set(live):
            raise
        raise VectorStoreRejected(
            f"The vectors of {run.table.name!r} are gone from the store.",
            resolution="Start a backfill: it builds them again.",
        ) from None


def _take_digests(
    context: RunContext, reader: TableReader, earlier: TableDigest | None
) -> tuple[TableDigest, TableDigest]:
    """The digest to compare now, of the earlier one's size, and the one to keep for the next sync.

    They differ if the table has grown or shrunk so much that another size suits it. The one to keep is taken first: what
    is committed between the two is compared now, and once more by the next sync.
    """
    bits = earlier.bits if earlier else 0
    digest = context.retry(reader.digest, bits)
    wanted_bits = digest_bits(digest.row_count)
    if abs(wanted_bits - bits) <= 1:
        return digest, digest
    next_digest = context.retry(reader.digest, wanted_bits)
    return context.retry(reader.digest, bits), next_digest


def _buckets_to_compare(
    run: TaskRun, vector_set: VectorSet, digest: TableDigest, earlier: TableDigest | None
) -> list[int] | None:
    """The buckets that changed, and with `retry_failed` those of failed rows; None: all."""
    every = run.settings.full_sync_every
    if run.has_option("full") or (every > 0 and run.table.syncs_since_full + 1 >= every):
        return None
    changed = digest.changed_buckets(earlier)
    if changed is None or not run.has_option("retry_failed"):
        return changed
    return sorted({*changed, *failed_rows_by_bucket(run, vector_set, digest.bits)})
