"""The nearest rows of a set's table: by the index, or one by one if a filter leaves few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from embedd_dagster.connectors.postgresql.pgvector.database import Database
from embedd_dagster.connectors.postgresql.pgvector.filters import compile_filter
from embedd_dagster.connectors.postgresql.pgvector.indexes import distance_expression, index_kind
from embedd_dagster.connectors.postgresql.pgvector.rows import vector_literal
from embedd_dagster.core.filters import Filter
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.vector_table import FilterType

FoundRow = tuple[Any, float, dict[str, Any], str]
"""Key as read, cosine distance (NaN if there is none), metadata, embedded text."""

_TIMEOUT_SECONDS: Final = 30.0
_EXACT_NUMBERS: Final = 4_000_000
"""The rows behind a filter are compared one by one if they are at most `exact_rows`, and their vectors have at most so many
numbers. If more rows match, the index soon finds enough of them. Counting up to 10,000 matches took ten times as long as the
search itself."""
_EF_SEARCH: Final = 120
_NO_JIT: Final = {"jit": "off"}


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What is looked for, and where."""

    table: sql.Identifier
    vector_schema: str
    key_column: sql.Composable
    vector: Vectors
    limit: int
    filters: Filter | None
    filter_types: Mapping[str, FilterType]
    exact_rows: int
    max_scan_tuples: int


def find_nearest(database: Database, query: SearchQuery) -> list[FoundRow]:
    """The nearest rows that the filter matches, fewer than the limit only if there are no more; roughly in order.

    Under a filter that few rows match, the index would be walked nearly to its end; and a walk may end before it has found
    enough. Then the matching rows are compared one by one.
    """
    settings = {
        "hnsw.ef_search": str(min(1000, max(_EF_SEARCH, 2 * query.limit))),
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.max_scan_tuples": str(query.max_scan_tuples),
        **_NO_JIT,
    }
    where = compile_filter(query.filters, query.filter_types) if query.filters is not None else None
    parts = _parts(query, where)
    few = where is not None and _matches_few(
        database, parts, min(query.exact_rows, _EXACT_NUMBERS // len(query.vector))
    )
    if not few:
        by_index = sql.SQL(
            "SELECT {key}, {distance}, metadata, embedded_text FROM {table} WHERE {condition}"
            " ORDER BY {order} LIMIT {candidates}"
        )
        rows = database.read(by_index.format(**parts), timeout_seconds=_TIMEOUT_SECONDS, settings=settings)
        if len(rows) >= query.limit:
            return rows
    one_by_one = sql.SQL(
        "WITH chosen AS MATERIALIZED (SELECT pk_value, {distance} AS distance FROM {table} WHERE {condition}),"
        " nearest AS (SELECT * FROM chosen ORDER BY distance LIMIT {limit})"
        " SELECT {key}, distance, metadata, embedded_text FROM nearest JOIN {table} USING (pk_value)"
    )
    return database.read(one_by_one.format(**parts), timeout_seconds=_TIMEOUT_SECONDS, settings=settings)


def _parts(query: SearchQuery, where: sql.Composable | None) -> dict[str, sql.Composable]:
    # all literals: a parameter next to them would make every `%` in a column's name a placeholder
    vectors, dimensions = sql.Identifier(query.vector_schema), len(query.vector)
    asked = sql.SQL("{}::{}.vector").format(sql.Literal(vector_literal(query.vector)), vectors)
    return {
        "key": query.key_column,
        "table": query.table,
        "condition": where or sql.SQL("TRUE"),
        "distance": sql.SQL("(embedding OPERATOR({}.<=>) {})").format(vectors, asked),
        "order": distance_expression(dimensions, vectors, asked),
        # half floats order a little differently: twice as many are compared by the vectors themselves
        "candidates": sql.Literal(query.limit if index_kind(dimensions) == "hnsw" else 2 * query.limit),
        "limit": sql.Literal(query.limit),
    }


def _matches_few(database: Database, parts: dict[str, sql.Composable], most: int) -> bool:
    count = sql.SQL("SELECT count(*) FROM (SELECT FROM {table} WHERE {condition} LIMIT {cap}) AS capped")
    counted = database.read(
        count.format(**parts, cap=sql.Literal(most + 1)), timeout_seconds=_TIMEOUT_SECONDS, settings=_NO_JIT
    )
    return bool(counted[0][0] <= most)
