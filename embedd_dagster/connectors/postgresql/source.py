"""PostgreSQL 14 and newer as a source: introspection here, reading in `reader`.

Only reads, without locks, temporary tables, writes or session-wide settings, so a read-only replica and a pooler in any mode
suffice. Only CDC needs its own session.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import psycopg

from embedd_dagster.connectors.postgresql.cdc.eligibility import check_cdc_eligible
from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.poolers import require_own_session
from embedd_dagster.connectors.postgresql.cdc.stream import STREAM_SETTINGS, PostgresCdcStream
from embedd_dagster.connectors.postgresql.connection import ConnectOptions
from embedd_dagster.connectors.postgresql.credentials import Credentials
from embedd_dagster.connectors.postgresql.errors import translated
from embedd_dagster.connectors.postgresql.estimates import row_estimate
from embedd_dagster.connectors.postgresql.introspection import (
    ColumnInfo,
    Relation,
    find_relation,
    list_tables,
)
from embedd_dagster.connectors.postgresql.key_checks import check_key
from embedd_dagster.connectors.postgresql.reader import PostgresTableReader
from embedd_dagster.connectors.postgresql.row_security import require_visible_rows
from embedd_dagster.connectors.postgresql.source_connections import SourceConnections
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import SourceRejected
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import Selection, SourceTable


class PostgresSource:
    """One PostgreSQL database, read as one user. Connects when first used."""

    stream_options: StreamOptions = StreamOptions()
    lock_timeout_seconds: float = 30.0
    """How long a read waits behind, for example, an ALTER TABLE, before it reports that the table is locked."""

    def __init__(
        self,
        credentials: Mapping[str, Any],
        *,
        statement_timeout_seconds: float,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """`credentials`: host, database, user, and optionally port, password, ssl_mode. Raises ConfigurationError."""
        self._connect = partial(
            SourceConnections,
            Credentials.parse(credentials),
            statement_timeout_seconds=statement_timeout_seconds,
            **options,
        )
        self._connections = self._connect(settings={"lock_timeout": f"{round(self.lock_timeout_seconds * 1000)}ms"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes connections. Idempotent."""
        self._connections.close()

    def check(self) -> None:
        """Returns when the database answers to these credentials."""
        with self._connection() as connection:
            connection.execute("SELECT 1")

    def tables(self, limit: int) -> list[SourceTable]:
        """Up to `limit` tables and views that may be read, by name; not system ones, extensions' or single partitions."""
        with self._connection() as connection:
            return list_tables(connection, limit)

    def describe(self, table: str) -> SourceTable:
        """The table's columns, spelled as the database does."""
        with self._connection(table) as connection:
            relation = find_relation(connection, table, self._connections.server)
            return relation.described(None if relation.is_plain_view else row_estimate(connection, relation))

    def check_key(self, table: str, column: str) -> None:
        """Returns when the column is unique and not null: by its constraints, otherwise by one scan of its rows."""
        with self._connection(table) as connection:
            relation = find_relation(connection, table, self._connections.server)
            key = relation.key(column)
            relation.require_readable([key], self._connections.server)
            check_key(connection, relation, key)

    def check_cdc_eligible(self, table: CdcTable) -> None:
        """Returns when CDC is possible for the table. Changes nothing."""
        require_own_session(self._connections)
        with self._connection(table.table) as connection:
            check_cdc_eligible(connection, table, self._connections.server)

    def cdc_stream(self, name: str) -> PostgresCdcStream:
        """The CDC stream of this name. It has its own connections, which the source's `close` leaves open."""
        return PostgresCdcStream(self._connect(settings=STREAM_SETTINGS, read_only=False), name, self.stream_options)

    def reader(self, selection: Selection) -> PostgresTableReader:
        """A reader of the selection; its columns may be spelled as `describe` does, or folded by PostgreSQL's rule."""
        server = self._connections.server
        with self._connection(selection.table) as connection:
            relation = find_relation(connection, selection.table, server)
            # All at once, so that an error names every missing column.
            relation.find_columns((selection.primary_key_column, *selection.columns))
            key = relation.key(selection.primary_key_column)
            columns = relation.find_columns(selection.columns)
            relation.require_readable([key, *columns], server)
            require_visible_rows(connection, relation, server)
        _require_filter_types(relation, columns, selection.filter_types)
        return PostgresTableReader(self._connections, relation, key, columns)

    @contextmanager
    def _connection(self, table: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        with translated(self._connections.server, relation=table), self._connections.borrow() as connection:
            yield connection


def _require_filter_types(
    relation: Relation, columns: Sequence[ColumnInfo], filter_types: Mapping[str, FilterType]
) -> None:
    """Raises SourceRejected for a column that has taken a type whose values its filter_type cannot hold."""
    for column in columns:
        wanted = filter_types.get(column.name)
        if wanted is not None and wanted not in column.filter_types:
            raise SourceRejected(
                f"Column {column.name!r} of {relation.label} is now of type {column.declared_type}, whose values"
                f" filter_type `{wanted}` cannot hold.",
                resolution="Give it another filter_type with PUT /v1/vector-tables/{id}, or the column its type back.",
            )
