"""Vectors in the user's own PostgreSQL: a table a set, a view for the public name.

The view is what users join and search: its columns and their types are the same for every version, so that it is replaced
in one statement under their own views. `embedding` has no dimension there, and still finds the index (PostgreSQL looks
through a cast that changes nothing).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, Unpack

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.connection import ConnectOptions
from embedd_dagster.connectors.postgresql.pgvector.database import Database, TableMissing, ValueRejected
from embedd_dagster.connectors.postgresql.pgvector.encoding import (
    compared_texts,
    find_rejected,
    without_texts,
    write_holdable,
)
from embedd_dagster.connectors.postgresql.pgvector.indexes import build_bucket_index, build_indexes, index_kind
from embedd_dagster.connectors.postgresql.pgvector.names import table_name, view_name
from embedd_dagster.connectors.postgresql.pgvector.objects import (
    OwnedRelation,
    create_table,
    drop_table,
    drop_view,
    relations,
    replace_view,
)
from embedd_dagster.connectors.postgresql.pgvector.preflight import find_schema, find_vector_schema
from embedd_dagster.connectors.postgresql.pgvector.rows import (
    COPIED_COLUMNS,
    KeyType,
    copy_body,
    load_key,
    load_metadata,
    load_vector,
    resolve_key_type,
)
from embedd_dagster.connectors.postgresql.pgvector.search import FoundRow, SearchQuery, find_nearest
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.keys import Key
from embedd_dagster.core.ranking import bucket_ranges, rank
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, Hit, PointBatch, Vectors, VectorSet
from embedd_dagster.errors import PointsRejected, VectorStoreUnavailable
from embedd_dagster.postgresql import Connection
from embedd_dagster.protocols.store import ReportIndexed, SearchRequest, ignore_report

_KEYS_PER_STATEMENT: Final = 10_000
_PAGE: Final = 10_000
# Upserts at once. One COPY at a time hardly fills a core; more than a few only wait for each other, and each opens a
# connection first: 16 at once load a quarter slower than 4 on two cores (see benchmarks/).
_WRITERS: Final = 4


class PgvectorStore:
    """An open platform store. Safe to use from several threads.

    Its tables carry the comment `embedd:<vector table id>`; what does not belongs to others and is never touched. A vector of
    zeros has no direction: it is stored and counted, and never found.
    """

    def __init__(
        self,
        credentials: Mapping[str, Any],
        schema: str | None = None,
        *,
        lock_attempt_seconds: float = 2.0,
        lock_seconds: float = 30.0,
        exact_rows: int = 2_000,
        max_scan_tuples: int = 50_000,
        report_seconds: float = 2.0,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Opens nothing yet. Raises ConfigurationError.

        Args:
            credentials: As the API takes them.
            schema: Where new vector tables go. None: the first schema of the search path that may be written.
            lock_attempt_seconds: How long one attempt waits for the lock of a table or view.
            lock_seconds: How long attempts for such a lock go on.
            exact_rows: Up to so many rows behind a filter are compared one by one.
            max_scan_tuples: How many rows a search by the index visits at most.
            report_seconds: How often the progress of an index build is reported.
            options: How to connect.
        """
        self._database = Database(
            credentials, lock_attempt_seconds=lock_attempt_seconds, lock_seconds=lock_seconds, **options
        )
        self._exact_rows, self._max_scan_tuples, self._report_seconds = exact_rows, max_scan_tuples, report_seconds
        self._wanted_schema = schema
        self._lock = threading.Lock()
        self._writers = threading.Semaphore(_WRITERS)
        self._schema: str | None = None
        self._vector_schema: str | None = None
        self._homes: dict[str, str] = {}
        self._key_types: dict[str, KeyType] = {}
        self._new: set[str] = set()
        """Sets whose table was made here, and in which no upsert has met a row that it replaces."""

    @property
    def schema(self) -> str:
        """The schema in which new vector tables are made."""
        with self._lock:
            if self._schema is None:
                with self._database.transaction() as connection:
                    self._schema = find_schema(connection, self._database, self._wanted_schema)
            return self._schema

    def check(self) -> None:
        """Returns when tables with vectors could be made. Raises with the SQL that an administrator has to run first."""
        with self._database.transaction() as connection, connection.transaction(force_rollback=True):
            find_schema(connection, self._database, self._wanted_schema)
            find_vector_schema(connection, self._database)

    def unholdable(self, texts: Sequence[str]) -> dict[int, str]:
        """Why the database cannot hold some of these texts, by their index."""

        def attempt(start: int, stop: int) -> None:
            with self._database.transaction() as connection:
                connection.execute("SELECT %s::pg_catalog.text[]", [list(map(clean_text, texts[start:stop]))])

        return {index: error.message for index, error in find_rejected(len(texts), attempt).items()}

    def create(self, vector_set: VectorSet) -> None:
        """An empty table with nothing but its primary key; one that is there is kept with its rows."""
        vector_schema, place = self._find_vector_schema(), self._table(vector_set)
        if self._database.with_locks(lambda connection: create_table(connection, vector_set, place, vector_schema)):
            self._new.add(vector_set.versioned_name)
        self._homes[vector_set.vector_table_id] = place.schema

    def upsert(self, vector_set: VectorSet, points: PointBatch) -> None:
        """Writes the points in one transaction: by binary COPY, after the rows they replace were removed.

        A new set has none to remove: it is tried without, which saves a bulk load a tenth of its time. To merge from a
        staging table instead would cost 30 %. Rows that the database cannot hold are found by bisection.
        """
        with self._writers:
            rejected = write_holdable(points, partial(self._write, vector_set))
        if rejected:
            raise PointsRejected(f"{len(rejected)} points cannot be held.", rejected=rejected) from None

    def _write(self, vector_set: VectorSet, points: PointBatch) -> None:
        key_type = self._key_type(vector_set)
        body = copy_body(points, key_type)
        table = self._table(vector_set).identifier
        copy = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, sql.SQL(COPIED_COLUMNS))

        def write(connection: Connection) -> None:
            with connection.cursor().copy(copy) as writer:
                writer.write(body)

        def replace(connection: Connection) -> None:
            _delete(connection, table, key_type, points.keys)
            write(connection)

        if vector_set.versioned_name in self._new:
            with self._database.transaction() as connection:
                try:
                    write(connection)
                except psycopg.errors.UniqueViolation:  # which has rolled it back
                    self._new.discard(vector_set.versioned_name)
                else:
                    return
        self._database.retrying_conflicts(replace)

    def delete(self, vector_set: VectorSet, keys: Sequence[Key]) -> None:
        """Removes the points of these keys."""
        key_type, table = self._key_type(vector_set), self._table(vector_set).identifier
        keys = [key for key in keys if key_type.can_hold(key)]
        for start in range(0, len(keys), _KEYS_PER_STATEMENT):
            part = keys[start : start + _KEYS_PER_STATEMENT]
            self._database.retrying_conflicts(
                lambda connection, part=part: _delete(connection, table, key_type, part, exactly=True)  # type: ignore[misc]
            )

    def fingerprints(self, vector_set: VectorSet, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every point whose `bits`-bit bucket is among `buckets` (None: of every point).

        Streamed out of one transaction, which ends with the iteration.
        """
        query = sql.SQL("SELECT {key}, row_hash, bucket FROM {table}").format(
            key=_key_column(self._key_type(vector_set)), table=self._table(vector_set).identifier
        )
        if buckets is not None:
            ranges = bucket_ranges(buckets, bits, BUCKET_BITS)
            if not ranges:
                return
            query += sql.SQL(
                " JOIN unnest({}::integer[], {}::integer[]) AS r (low, high) ON bucket BETWEEN low AND high"
            ).format(sql.Literal([low for low, _high in ranges]), sql.Literal([high for _low, high in ranges]))
        with (
            self._database.transaction() as connection,
            connection.cursor("embedd_fingerprints", binary=True) as cursor,
        ):
            cursor.execute(query)
            while page := cursor.fetchmany(_PAGE):
                for key, row_hash, bucket in page:
                    yield Fingerprint(load_key(key), row_hash, bucket)

    def vectors(self, vector_set: VectorSet, keys: Sequence[Key]) -> dict[Key, tuple[int, Vectors]]:
        """For each of these keys that has a point: its text hash and its vector."""
        key_type = self._key_type(vector_set)
        query = sql.SQL("SELECT {key}, text_hash, embedding FROM {table} WHERE {is_among}").format(
            key=_key_column(key_type),
            table=self._table(vector_set).identifier,
            is_among=sql.SQL(key_type.is_among),
        )
        found: dict[Key, tuple[int, Vectors]] = {}
        keys = [key for key in keys if key_type.can_hold(key)]
        with self._database.transaction() as connection, connection.cursor(binary=True) as cursor:
            for start in range(0, len(keys), _KEYS_PER_STATEMENT):
                cursor.execute(query, [key_type.parameter(keys[start : start + _KEYS_PER_STATEMENT])])
                for key, text_hash, raw in cursor:
                    found[load_key(key)] = (text_hash, load_vector(raw))
        return found

    def index_buckets(self, vector_set: VectorSet) -> None:
        """Builds the index over buckets if it is not there yet."""
        build_bucket_index(self._database, self._table(vector_set))

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        """Builds the indexes that are not there yet and gathers statistics; returns when the table is fast to search."""
        build_indexes(
            self._database,
            vector_set,
            self._table(vector_set),
            vector_schema=self._find_vector_schema(),
            report=report,
            report_seconds=self._report_seconds,
        )

    def count(self, vector_set: VectorSet) -> int:
        """The exact number of points; 0 if the table does not exist."""
        query = sql.SQL("SELECT count(*) FROM {}").format(self._table(vector_set).identifier)
        try:
            with self._database.transaction() as connection:
                return int(connection.execute(query).fetchall()[0][0])
        except TableMissing:
            return 0

    def search(self, vector_set: VectorSet, request: SearchRequest) -> list[Hit]:
        """The nearest points by cosine, highest first, among exactly those the filter matches."""
        if not request.vector.any():
            return []
        try:
            rows = self._find_nearest(vector_set, request)
        except ValueRejected:
            if request.filter is None:
                raise
            texts = list(compared_texts(request.filter))  # no row has one that the database cannot hold
            absent = frozenset(texts[index] for index in self.unholdable(texts))
            rows = self._find_nearest(vector_set, replace(request, filter=without_texts(request.filter, absent)))
        hits = (
            Hit(load_key(key), 1.0 - distance, load_metadata(metadata, vector_set.filter_types), text)
            for key, distance, metadata, text in rows
            if not math.isnan(distance)
        )
        return rank(hits, request.limit, request.minimum_score)

    def _find_nearest(self, vector_set: VectorSet, request: SearchRequest) -> list[FoundRow]:
        query = SearchQuery(
            table=self._table(vector_set).identifier,
            vector_schema=self._find_vector_schema(),
            key_column=_key_column(self._key_type(vector_set)),
            vector=request.vector,
            limit=request.limit,
            filters=request.filter,
            filter_types=vector_set.filter_types,
            exact_rows=self._exact_rows,
            max_scan_tuples=self._max_scan_tuples,
        )
        try:
            return find_nearest(self._database, query)
        except TableMissing as error:
            raise VectorStoreUnavailable(
                f"The vectors that were asked are not in the store: {error.message}",
                resolution="They were just replaced, then ask again; or the store has lost them, then start a backfill.",
            ) from None

    def publish(self, vector_set: VectorSet) -> None:
        """Makes the view show this set, in one transaction. Views and grants of users on it stay."""
        vector_schema, table = self._find_vector_schema(), self._table(vector_set)
        view = self._place(vector_set.vector_table_id, view_name(vector_set.public_name))
        self._database.with_locks(lambda connection: replace_view(connection, view, table.identifier, vector_schema))

    def versions(self, vector_table_id: str) -> list[int]:
        """The versions of this vector table that have a table, ascending."""
        prefix = f"embedd_{vector_table_id}_v"
        with self._database.transaction() as connection:
            names = relations(connection, vector_table_id)
        numbers = (name.removeprefix(prefix) for _schema, name in names)
        return sorted({int(number) for number in numbers if number.isdecimal()})

    def drop(self, vector_table_id: str, version: int) -> None:
        """Removes a table, with the public view if that shows it. Raises VectorStoreRejected if users' views depend on it."""
        table = self._place(vector_table_id, f"embedd_{vector_table_id}_v{version}")
        self._database.with_locks(lambda connection: drop_table(connection, table))

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        """Removes the view. Raises VectorStoreRejected if users' views depend on it."""
        view = self._place(vector_table_id, view_name(public_name))
        self._database.with_locks(lambda connection: drop_view(connection, view))

    def info(self, vector_set: VectorSet) -> Mapping[str, str | int]:
        """Where the set is, its size, and its index's state."""
        table = self._table(vector_set)
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT c.reltuples::bigint, pg_total_relation_size(c.oid), (SELECT i.indisvalid FROM pg_index i"
                " JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND x.relname = %s)"
                " FROM pg_class c WHERE c.oid = to_regclass(%s)",
                [f"{table_name(vector_set)}_hnsw", table.identifier.as_string(connection)],
            ).fetchone()
        if row is None:
            raise TableMissing(f"There is no table {table_name(vector_set)} in {self._database.address}.")
        kind = index_kind(vector_set.dimensions)
        return {
            "store": "pgvector",
            "address": self._database.address,
            "table": str(table),
            "view": f"{table.schema}.{view_name(vector_set.public_name)}",
            "points_estimate": max(0, row[0]),
            "bytes": row[1],
            "index": f"none: {kind}" if kind.startswith("exact") else f"{kind}: {'ready' if row[2] else 'not built'}",
        }

    def close(self) -> None:
        """Closes connections. Idempotent."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find_vector_schema(self) -> str:
        with self._lock:
            if self._vector_schema is None:
                with self._database.transaction() as connection:
                    self._vector_schema = find_vector_schema(connection, self._database)
            return self._vector_schema

    def _home(self, vector_table_id: str) -> str:
        """The schema of the vector table's objects: where they are, even if the search path has changed since."""
        home = self._homes.get(vector_table_id)
        if home is not None:
            return home
        with self._database.transaction() as connection:
            found = relations(connection, vector_table_id)
        if not found:
            return self.schema
        self._homes[vector_table_id] = found[0][0]
        return found[0][0]

    def _place(self, vector_table_id: str, name: str) -> OwnedRelation:
        return OwnedRelation(self._home(vector_table_id), name, f"embedd:{vector_table_id}")

    def _table(self, vector_set: VectorSet) -> OwnedRelation:
        return self._place(vector_set.vector_table_id, table_name(vector_set))

    def _key_type(self, vector_set: VectorSet) -> KeyType:
        name = vector_set.versioned_name
        if name not in self._key_types:
            with self._database.transaction() as connection:
                self._key_types[name] = resolve_key_type(connection, vector_set.key_type)
        return self._key_types[name]


def _key_column(key_type: KeyType) -> sql.SQL:
    return sql.SQL(key_type.key_expression)


def _delete(
    connection: Connection, table: sql.Identifier, key_type: KeyType, keys: list[Key], *, exactly: bool = False
) -> None:
    """Removes the rows whose keys the type holds for equal to these; `exactly`: not `ABC` of a citext for `abc`."""
    statement = sql.SQL("DELETE FROM {} WHERE {}").format(table, sql.SQL(key_type.is_among))
    parameters: list[Any] = [key_type.parameter(keys)]
    if exactly and key_type.is_read_as_text:
        statement += sql.SQL(' AND {} COLLATE "C" = ANY(%s::text[])').format(_key_column(key_type))
        parameters.append(keys)
    connection.execute(statement, parameters)
