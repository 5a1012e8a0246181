"""Whether a column tells the rows of a table apart: by a constraint on exactly this column, otherwise by counting."""

from __future__ import annotations

from typing import Any, Final

import psycopg
from psycopg.sql import SQL

from embedd_dagster.connectors.postgresql.introspection import ColumnInfo, Relation, identifier
from embedd_dagster.errors import SourceRejected

# An index on this column alone, over all rows, that holds at every instant: not one still being built, not a partial or
# a deferrable one. The index of a table says nothing of the rows of tables that inherit from it.
_UNIQUE: Final = """
SELECT 1 FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
WHERE i.indrelid = %s::pg_catalog.oid AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
  AND i.indnkeyatts = 1 AND i.indkey[0] = %s
  AND (c.relkind = 'p' OR NOT EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhparent = c.oid))
LIMIT 1
"""

_COUNT: Final = """
SELECT COALESCE(pg_catalog.sum(n) FILTER (WHERE k IS NULL), 0)::pg_catalog.int8,
       COALESCE(pg_catalog.sum(n) FILTER (WHERE k IS NOT NULL), 0)::pg_catalog.int8, pg_catalog.count(k)
FROM (SELECT t.{column} AS k, pg_catalog.count(*) AS n FROM {table} AS t GROUP BY t.{column}) AS s
"""

_EXAMPLE: Final = """
SELECT {text} FROM (SELECT t.{column} AS k FROM {table} AS t WHERE t.{column} IS NOT NULL
                    GROUP BY t.{column} HAVING pg_catalog.count(*) > 1 LIMIT 1) AS s
"""

_LONGEST_EXAMPLE: Final = 80
_RESOLUTION: Final = (
    "Choose a column that is unique and never null, or correct these rows and add a constraint. Where only several columns"
    " together are unique, make a view with one column of them all, and use that."
)


def check_key(connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo) -> None:
    """Returns when the column is unique and not null. Raises SourceRejected with how many rows are not, and an example."""
    if not (key.not_null and _is_constrained(connection, relation, key)):
        without_key, repeated = _count(connection, relation, key)
        _refuse(connection, relation, key, without_key, repeated)


def check_unique(connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo) -> None:
    """Returns when no two rows have one key; rows without any are left out of what is read. Raises as `check_key`."""
    if not _is_constrained(connection, relation, key):
        _without_key, repeated = _count(connection, relation, key)
        _refuse(connection, relation, key, 0, repeated)


def _is_constrained(connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo) -> bool:
    return connection.execute(_UNIQUE, [relation.oid, key.number]).fetchone() is not None


def _count(connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo) -> tuple[int, int]:
    """How many rows have no key, and how many repeat another's."""
    statement = SQL(_COUNT).format(column=identifier(key.name), table=relation.identifier)
    row = connection.execute(statement, []).fetchone()
    without_key, with_key, distinct = row or (0, 0, 0)
    return without_key, with_key - distinct


def _refuse(
    connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo, without_key: int, repeated: int
) -> None:
    faults = []
    if without_key:
        faults.append(f"{without_key} {'row has' if without_key == 1 else 'rows have'} no value in it")
    if repeated:
        example = _example(connection, relation, key)
        faults.append(
            f"it is not unique: {repeated} {'row repeats' if repeated == 1 else 'rows repeat'} another's value"
            + (f", such as {example}" if example else "")
        )
    if faults:
        raise SourceRejected(
            f"Column {key.name!r} of {relation.label} is not a primary key: {'; '.join(faults)}.",
            resolution=_RESOLUTION,
        )


def _example(connection: psycopg.Connection[Any], relation: Relation, key: ColumnInfo) -> str | None:
    statement = SQL(_EXAMPLE).format(text=key.text(SQL("s.k")), column=identifier(key.name), table=relation.identifier)
    row = connection.execute(statement, []).fetchone()
    return shortened(row[0]) if row else None


def shortened(key: Any) -> str:
    """A key for a message."""
    text = str(key)
    return repr(text if len(text) <= _LONGEST_EXAMPLE else f"{text[:_LONGEST_EXAMPLE]}…")
