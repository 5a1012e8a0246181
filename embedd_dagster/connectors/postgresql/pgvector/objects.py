"""Our tables and views in the user's own database, recognized by their comment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.connectors.postgresql.pgvector.rows import resolve_key_type
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.errors import VectorStoreRejected
from embedd_dagster.postgresql import Connection

_INLINE_DIMENSIONS: Final = range(400, 1801)
"""Vectors of these sizes fit into a page, and do not by themselves: kept inline they are written a fifth faster."""


@dataclass(frozen=True, slots=True)
class OwnedRelation:
    """A table or view of ours: its schema and name, and the comment that says so."""

    schema: str
    name: str
    mark: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Its quoted name, for a statement."""
        return sql.Identifier(self.schema, self.name)


def create_table(connection: Connection, vector_set: VectorSet, place: OwnedRelation, vector_schema: str) -> bool:
    """Makes the table of a set, unless it is there: then it is kept, and the answer is False.

    Raises VectorStoreRejected for somebody else's.
    """
    if check_owned(connection, place):
        return False
    key_type = resolve_key_type(connection, vector_set.key_type)
    inline = vector_set.dimensions in _INLINE_DIMENSIONS
    statement = sql.SQL(
        "CREATE TABLE IF NOT EXISTS {table} (pk_value {key_type} PRIMARY KEY,"
        " embedding {vectors}.vector({dimensions}) NOT NULL, embedded_text text NOT NULL,"
        " metadata jsonb NOT NULL, row_hash bigint NOT NULL, text_hash bigint NOT NULL,"
        " bucket integer NOT NULL, updated_at timestamptz NOT NULL DEFAULT now()) {options}"
    ).format(
        table=place.identifier,
        key_type=sql.SQL(key_type.sql_name),  # as the server itself wrote it
        vectors=sql.Identifier(vector_schema),
        dimensions=sql.Literal(vector_set.dimensions),
        options=sql.SQL("WITH (toast_tuple_target = 8160)" if inline else ""),
    )
    connection.execute(statement)
    if inline:
        connection.execute(sql.SQL("ALTER TABLE {} ALTER embedding SET STORAGE MAIN").format(place.identifier))
    connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(place.identifier, sql.Literal(place.mark)))
    return True


def replace_view(connection: Connection, view: OwnedRelation, table: sql.Identifier, vector_schema: str) -> None:
    """Makes the view show this table, under the views and grants that users have put on it.

    Only a primary key of another type makes it a new view: then grants are lost, and views over it are rejected.
    """
    check_owned(connection, view)
    define = sql.SQL(
        " VIEW {view} AS SELECT pk_value, embedding::{vectors}.vector AS embedding, embedded_text, metadata, row_hash,"
        " text_hash, bucket, updated_at FROM {table}"
    ).format(view=view.identifier, vectors=sql.Identifier(vector_schema), table=table)
    try:
        with connection.transaction():
            connection.execute(sql.SQL("CREATE OR REPLACE") + define)
    except psycopg.errors.InvalidTableDefinition:
        drop_view(connection, view)
        connection.execute(sql.SQL("CREATE") + define)
    connection.execute(sql.SQL("COMMENT ON VIEW {} IS {}").format(view.identifier, sql.Literal(view.mark)))


def drop_view(connection: Connection, view: OwnedRelation) -> None:
    """Removes a view of ours; one that is not there is fine. Raises VectorStoreRejected if users' views depend on it."""
    if check_owned(connection, view):
        _require_no_dependents(view, _dependents(connection, view))
        connection.execute(sql.SQL("DROP VIEW {}").format(view.identifier))


def drop_table(connection: Connection, table: OwnedRelation) -> None:
    """Removes a table of ours, with the public view if that shows it; one that is not there is fine.

    Raises VectorStoreRejected if users' views depend on it.
    """
    if not check_owned(connection, table):
        return
    views = _dependents(connection, table)
    _require_no_dependents(table, [view for view in views if view[2] != table.mark])
    for schema, name, _comment in views:
        drop_view(connection, OwnedRelation(schema, name, table.mark))
    connection.execute(sql.SQL("DROP TABLE {}").format(table.identifier))


def check_owned(connection: Connection, place: OwnedRelation) -> bool:
    """Whether the relation is there and ours, by its comment. Raises VectorStoreRejected for somebody else's."""
    row = connection.execute(
        "SELECT obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s",
        [place.schema, place.name],
    ).fetchone()
    if row is not None and row[0] != place.mark:
        raise VectorStoreRejected(
            f"The relation {place} exists and is not part of this vector table, as its comment would say.",
            resolution=f"Rename it: ALTER TABLE {quoted(place.schema)}.{quoted(place.name)} RENAME TO …;",
        )
    return row is not None


def relations(connection: Connection, vector_table_id: str) -> list[tuple[str, str]]:
    """Schema and name of every table and view of a vector table."""
    return connection.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'v') AND starts_with(c.relname, 'embedd_vt_')"
        " AND obj_description(c.oid, 'pg_class') = %s ORDER BY c.relkind, c.oid",
        [f"embedd:{vector_table_id}"],
    ).fetchall()


def _dependents(connection: Connection, place: OwnedRelation) -> list[tuple[str, str, str | None]]:
    # the views over a relation: schema, name and comment of each
    return connection.execute(
        """
        SELECT DISTINCT n.nspname, v.relname, obj_description(v.oid, 'pg_class')
        FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class
        JOIN pg_namespace n ON n.oid = v.relnamespace
        WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
          AND d.refobjid = to_regclass(%s) AND v.oid <> d.refobjid
        """,
        [place.identifier.as_string(connection)],
    ).fetchall()


def _require_no_dependents(place: OwnedRelation, views: list[tuple[str, str, str | None]]) -> None:
    if views:
        listed = ", ".join(f"{schema}.{name}" for schema, name, _comment in views)
        raise VectorStoreRejected(
            f"{place} cannot be replaced or removed, as views were made over it: {listed}.",
            resolution="Drop those views, then try again.",
        )
