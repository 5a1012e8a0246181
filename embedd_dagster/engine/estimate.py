"""What a backfill would cost, from a sample of the rows: nothing is embedded, nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from embedd_dagster.catalog import vector_sets, vector_tables
from embedd_dagster.connectors.registry import embedder_spec, find_model_by_name
from embedd_dagster.core.embedded_text import compose_text, text_hash
from embedd_dagster.core.rows import SourceRow
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.validation import open_source_briefly
from embedd_dagster.errors import NotFound
from embedd_dagster.protocols.source import PAGE_BYTES, Selection, TableReader

_SAMPLED_RANGES = 8
_SAMPLED_ROWS = 64
"""Of each range."""
_BYTES_A_TOKEN = 4
"""A usual number for English text; other languages have fewer, so that their estimate is too low."""
_TEXTS_PER_REQUEST = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a backfill of the present configuration would take."""

    rows: int
    sampled_rows: int
    rows_to_embed: int
    rows_reused: int
    """Rows whose vector is in the live set already."""
    rows_skipped: int
    """Rows without text."""
    tokens: int
    cost_usd: float
    """By list price; 0 for a model without one in the catalog."""
    seconds: float
    """At the provider's configured limits, or at the connector's usual speed."""


def estimate(runtime: Runtime, environment_id: str, vector_table_id: str) -> Estimate:
    """The estimate, from some 500 rows spread over the table. Raises NotFound and what the source and the store raise."""
    with runtime.catalog.transaction() as session:
        vector_tables.get(session, environment_id, vector_table_id)
        endpoints = vector_tables.load_endpoints(session, vector_table_id)
        if endpoints is None:
            raise NotFound("vector_table", vector_table_id)
        table, provider = endpoints.vector_table, endpoints.embedding_provider
        live = None if table.live_version is None else vector_sets.get(session, table.id, table.live_version)
    configuration = table.configuration
    selection = Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names)
    with open_source_briefly(runtime, endpoints.connection) as source:
        reader = source.reader(selection)
        row_count = reader.count()
        sample = _sample(reader)
    texts = {row.key: _text(configuration, row) for row in sample}
    written = {key: text for key, text in texts.items() if text}
    reusable: set[object] = set()
    if live is not None and written:
        old = VectorConfiguration.from_json(live.configuration)
        if _same_model(old, configuration):
            with runtime.open_store(Mode(table.mode), endpoints.connection) as store:
                stored = store.vectors(vector_sets.as_vector_set(live, table.storage_name), list(written))
            # a store may spell a key as it was when it was written, such as one of type citext
            reusable = {
                key for key, (hashed, _vector) in stored.items() if key in written and hashed == text_hash(written[key])
            }
    share = row_count / len(sample) if sample else 0.0
    model = find_model_by_name(configuration.embedding_model)
    limit = model.max_tokens if model else 8192
    sampled_tokens = sum(
        min(len(text.encode()) // _BYTES_A_TOKEN + 1, limit) for key, text in written.items() if key not in reusable
    )
    tokens = round(sampled_tokens * share)
    rows_to_embed = round((len(written) - len(reusable)) * share)
    limits = provider.limits if provider else {}
    embedder = embedder_spec(provider.provider if provider else endpoints.connection.provider)
    return Estimate(
        rows=row_count,
        sampled_rows=len(sample),
        rows_to_embed=rows_to_embed,
        rows_reused=round(len(reusable) * share),
        rows_skipped=round((len(sample) - len(written)) * share),
        tokens=tokens,
        cost_usd=round(tokens / 1_000_000 * (model.price_per_million_tokens if model else 0.0), 6),
        seconds=round(_seconds(rows_to_embed, tokens, limits, embedder.rows_per_second), 1),
    )


def _sample(reader: TableReader) -> list[SourceRow]:
    rows: list[SourceRow] = []
    for key_range in reader.split(_SAMPLED_RANGES):
        pages = reader.read(key_range, page_rows=_SAMPLED_ROWS, page_bytes=PAGE_BYTES)
        rows.extend(row for page in islice(pages, 1) for row in page)
    return rows


def _text(configuration: VectorConfiguration, row: SourceRow) -> str:
    columns = configuration.embedding_columns
    values = dict(zip(configuration.column_names, row.values, strict=True))
    return compose_text(columns, [values[column.name] for column in columns])


def _same_model(old: VectorConfiguration, new: VectorConfiguration) -> bool:
    return (old.embedding_model, old.embedding_dimensions) == (new.embedding_model, new.embedding_dimensions)


def _seconds(rows: int, tokens: int, limits: dict[str, int], rows_per_second: float) -> float:
    seconds = rows / rows_per_second
    if per_minute := limits.get("tokens_per_minute"):
        seconds = max(seconds, tokens / per_minute * 60)
    if per_minute := limits.get("requests_per_minute"):
        texts = min(_TEXTS_PER_REQUEST, limits.get("max_batch_items") or _TEXTS_PER_REQUEST)
        seconds = max(seconds, rows / texts / per_minute * 60)
    return seconds
