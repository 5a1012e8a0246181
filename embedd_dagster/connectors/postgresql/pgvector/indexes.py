"""The indexes of a set's table, built once it is loaded: an HNSW index over rows that are there takes a fraction of the time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Final

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.pgvector.database import Database
from embedd_dagster.connectors.postgresql.pgvector.filters import index_expressions
from embedd_dagster.connectors.postgresql.pgvector.index_progress import reported_build
from embedd_dagster.connectors.postgresql.pgvector.objects import OwnedRelation
from embedd_dagster.connectors.postgresql.sessions import set_local
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.postgresql import Connection
from embedd_dagster.protocols.store import ReportIndexed

_MAX_VECTOR: Final = 2_000
_MAX_HALFVEC: Final = 4_000
"""pgvector's limits of dimensions for HNSW over `vector` and over `halfvec`."""
_LINKS_BYTES: Final = 600
"""Of one point in the graph that pgvector builds in memory, besides its vector."""
_MEGABYTE: Final = 2**20
_LEAST_MEMORY_MB: Final = 64
_MOST_MEMORY_MB: Final = 4096


def index_kind(dimensions: int) -> str:
    """`hnsw`, `hnsw on halfvec`, or why there is none."""
    if dimensions <= _MAX_VECTOR:
        return "hnsw"
    if dimensions <= _MAX_HALFVEC:
        return "hnsw on halfvec"
    return f"exact search, as pgvector indexes at most {_MAX_HALFVEC} dimensions"


def distance_expression(dimensions: int, vectors: sql.Identifier, asked: sql.Composable) -> sql.Composable:
    """What to order by, so that the index serves it. `vectors` is pgvector's schema, `asked` the vector asked for."""
    return sql.SQL("{} OPERATOR({}.<=>) {}").format(
        _indexed(dimensions, vectors), vectors, _as_indexed(asked, dimensions, vectors)
    )


def build_indexes(
    database: Database,
    vector_set: VectorSet,
    place: OwnedRelation,
    *,
    vector_schema: str,
    report: ReportIndexed,
    report_seconds: float,
) -> None:
    """Every index that is missing, each in its own transaction, so that a killed build loses at most one.

    `report` takes how far the index over the vectors is: it takes nearly all of the time.
    """
    table, vectors = place.identifier, sql.Identifier(vector_schema)
    build_bucket_index(database, place)
    wanted: list[tuple[str, sql.Composable]] = []
    for position, expression in enumerate(index_expressions(vector_set.filter_types)):
        wanted.append((f"filter{position}", sql.SQL("({})").format(expression)))
    if vector_set.dimensions <= _MAX_HALFVEC:
        operators = "vector_cosine_ops" if vector_set.dimensions <= _MAX_VECTOR else "halfvec_cosine_ops"
        by_distance = sql.SQL("USING hnsw (({}) {}.{})").format(
            _indexed(vector_set.dimensions, vectors), vectors, sql.Identifier(operators)
        )
        wanted.append(("hnsw", by_distance))
    with database.transaction(timeout_seconds=0) as connection:
        connection.execute(sql.SQL("ANALYZE {}").format(table))
    for suffix, method in wanted:
        with reported_build(database, place, report, report_seconds) if suffix == "hnsw" else nullcontext():
            try:
                with database.transaction(timeout_seconds=0) as connection:
                    _build(connection, place, suffix, method, _memory(connection, table, vector_set.dimensions))
            except _MemoryShort:
                with database.transaction(timeout_seconds=0) as connection:
                    _build(connection, place, suffix, method, {"max_parallel_maintenance_workers": "0"})
    # Without it the table has no visibility map, and no index alone answers.
    database.vacuum(table)
    with database.transaction(timeout_seconds=0) as connection:  # statistics of the indexes' expressions
        connection.execute(sql.SQL("ANALYZE {}").format(table))


def build_bucket_index(database: Database, place: OwnedRelation) -> None:
    """The index that finds the rows of some buckets by itself, without the wide table."""
    with database.transaction(timeout_seconds=0) as connection:
        _build(connection, place, "bucket", sql.SQL("(bucket) INCLUDE (pk_value, row_hash)"), {})


class _MemoryShort(Exception):
    """The server could not get the memory for a parallel build, such as /dev/shm of a container."""


def _build(
    connection: Connection, place: OwnedRelation, suffix: str, method: sql.Composable, settings: Mapping[str, str]
) -> None:
    index = sql.Identifier(place.schema, f"{place.name}_{suffix}")
    name = index.as_string(connection)
    set_local(connection, {"lock_timeout": "0", **settings})
    # a build that a killed run left behind may still be at work on the server: wait for it instead of doing it twice
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
    state = connection.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", [name]).fetchone()
    if state == (True,):
        return
    if state is not None:
        connection.execute(sql.SQL("DROP INDEX {}").format(index))
    statement = sql.SQL("CREATE INDEX {} ON {} {}").format(
        sql.Identifier(f"{place.name}_{suffix}"), place.identifier, method
    )
    try:
        connection.execute(statement)
    except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory):
        if "maintenance_work_mem" not in settings:
            raise
        raise _MemoryShort from None


def _memory(connection: Connection, table: sql.Identifier, dimensions: int) -> dict[str, str]:
    """maintenance_work_mem raised to what the graph needs, as far as the server's shared buffers say it has."""
    row: Any = connection.execute(
        "SELECT greatest(c.reltuples, 0)::bigint, pg_size_bytes(current_setting('maintenance_work_mem')),"
        " pg_size_bytes(current_setting('shared_buffers')) FROM pg_class c WHERE c.oid = to_regclass(%s)",
        [table.as_string(connection)],
    ).fetchone()
    rows, present, buffers = row
    needed = rows * (4 * dimensions + _LINKS_BYTES) * 1.1 / _MEGABYTE
    # a server tuned by its owner has some quarter of its memory as buffers, an untuned one 128 MB
    allowed = min(max(4 * buffers / _MEGABYTE, _LEAST_MEMORY_MB), _MOST_MEMORY_MB)
    megabytes = int(max(present / _MEGABYTE, min(needed, allowed)))
    return {"maintenance_work_mem": f"{megabytes}MB"}


def _indexed(dimensions: int, vectors: sql.Identifier) -> sql.Composable:
    if not _MAX_VECTOR < dimensions <= _MAX_HALFVEC:
        return sql.SQL("embedding")
    # through `vector`, as the public view has it: an expression is matched to its index by its very form
    return _as_indexed(sql.SQL("embedding::{}.vector").format(vectors), dimensions, vectors)


def _as_indexed(vector: sql.Composable, dimensions: int, vectors: sql.Identifier) -> sql.Composable:
    if not _MAX_VECTOR < dimensions <= _MAX_HALFVEC:
        return vector
    return sql.SQL("{}::{}.halfvec({})").format(vector, vectors, sql.Literal(dimensions))
