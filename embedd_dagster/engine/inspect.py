"""Compares a live vector set with its source: the facts behind the asset checks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from embedd_dagster.catalog import failed_rows, vector_sets, vector_tables
from embedd_dagster.core.keys import encode_key
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import NotFound, NotReady
from embedd_dagster.protocols.source import PAGE_BYTES, Selection


@dataclass(frozen=True, slots=True)
class LiveSetInspection:
    """A live set and its source, at about the same instant."""

    source_rows: int
    point_count: int
    skipped_count: int
    """Rows without text, as of the last completed run."""
    failed_count: int
    sampled: int
    dimensions_wrong: int
    """Sampled vectors with other than the configured dimensions."""
    hash_mismatches: int
    """Sampled points whose row has changed or is gone since the last sync."""


def inspect_live_set(runtime: Runtime, vector_table_id: str, sample_size: int = 100) -> LiveSetInspection:
    """Counts both sides and compares a sample of points with their rows. Raises NotFound, NotReady."""
    with runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, vector_table_id)
        if endpoints is None:
            raise NotFound("vector_table", vector_table_id)
        table = endpoints.vector_table
        if table.live_version is None:
            raise NotReady("Nothing is live yet.")
        live = vector_sets.get(session, table.id, table.live_version)
        failed_count = failed_rows.count(session, table.id, live.version)
    configuration = VectorConfiguration.from_json(live.configuration)
    vector_set = vector_sets.as_vector_set(live, table.storage_name)
    selection = Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names)
    with (
        runtime.open_source(endpoints.connection) as source,
        runtime.open_store(Mode(table.mode), endpoints.connection) as store,
    ):
        reader = source.reader(selection)
        points = list(islice(store.fingerprints(vector_set, 0, None), sample_size))
        keys = [point.key for point in points]
        vectors = store.vectors(vector_set, keys)
        pages = reader.read_keys(keys, page_bytes=PAGE_BYTES)
        rows = {encode_key(row.key): row.row_hash for page in pages for row in page}
        return LiveSetInspection(
            source_rows=reader.count(),
            point_count=store.count(vector_set),
            skipped_count=live.skipped_count or 0,
            failed_count=failed_count,
            sampled=len(points),
            dimensions_wrong=sum(len(vector) != vector_set.dimensions for _hash, vector in vectors.values()),
            hash_mismatches=sum(rows.get(encode_key(point.key)) != point.row_hash for point in points),
        )
