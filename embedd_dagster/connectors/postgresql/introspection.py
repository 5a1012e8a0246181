"""What PostgreSQL's system catalog says of a table: found by the name a user gave, with its columns and rights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.errors import access_denied
from embedd_dagster.connectors.postgresql.identifiers import folded, quoted, readings, spelling, suggestion
from embedd_dagster.connectors.postgresql.sessions import role_schemas
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import SourceRejected, SourceTableNotFound
from embedd_dagster.protocols.source import SourceColumn, SourceTable

# base type → the Python type of its keys. Any enum is a key too, as text.
_KEY_TYPES: Final[dict[str, type]] = {
    "int2": int, "int4": int, "int8": int, "numeric": Decimal, "uuid": UUID,
    "text": str, "varchar": str, "bpchar": str, "citext": str,
    "date": date, "timestamp": datetime, "timestamptz": datetime,
}  # fmt: skip
_INTEGERS: Final = frozenset({"int2", "int4", "int8"})
_NUMBERS: Final = _INTEGERS | {"float4", "float8", "numeric"}
# PostgreSQL's own categories: boolean, date, enum, network, numeric, string, timespan; uuid has none of its own.
_SCALAR_CATEGORIES: Final = frozenset("BDEINST")


def identifier(*names: str) -> sql.Identifier:
    """The name in a statement that is executed with parameters, even an empty list, where a `%` is doubled."""
    return sql.Identifier(*(name.replace("%", "%%") for name in names))


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """A column; a domain is seen through to its base type."""

    number: int
    name: str
    declared_type: str
    not_null: bool
    readable: bool
    base_name: str
    """Empty for a type that somebody defined, which may have any name; citext is an exception."""
    base_schema: str
    base_kind: str
    category: str
    ddl_type: str
    """The base type with its length or precision: good in DDL."""
    bare_type: str
    """The base type without them: good for a cast that must not cut a value off."""
    type_modifier: int
    array_of: int
    """The element type's OID of a true array, otherwise 0."""
    type_oid: int

    @property
    def key_type(self) -> type | None:
        """The Python type of keys of this column, or None if it cannot be a key."""
        return str if self.base_kind == "e" else _KEY_TYPES.get(self.base_name)

    @property
    def filter_types(self) -> frozenset[FilterType]:
        """The filter types that can hold its values."""
        if self.array_of or (self.category not in _SCALAR_CATEGORIES and self.base_name != "uuid"):
            return frozenset()
        held = {FilterType.KEYWORD}
        if self.base_name in _NUMBERS:
            held.add(FilterType.FLOAT)
        if self.base_name in _INTEGERS or (self.base_name == "numeric" and self._has_no_fraction):
            held.add(FilterType.INTEGER)
        if self.base_name == "bool":
            held.add(FilterType.BOOLEAN)
        return frozenset(held)

    @property
    def _has_no_fraction(self) -> bool:
        if self.type_modifier < 0:
            return False
        scale = (self.type_modifier - 4) & 0x7FF  # 11 bits, signed
        return scale == 0 or scale >= 0x400

    def output(self, expression: sql.Composable) -> sql.Composable:
        """The expression, of this column's type, in the form that is read."""
        if self.base_name == "bpchar":  # the cast drops the padding, which PostgreSQL itself does not regard
            return sql.SQL("{}::pg_catalog.text").format(expression)
        if self.array_of and self.base_schema != "pg_catalog":
            return sql.SQL("pg_catalog.textin(pg_catalog.array_out({}))::pg_catalog.text[]").format(expression)
        if self.array_of and (self.base_name == "_bpchar" or self.type_oid not in _DRIVER_ARRAYS):
            return sql.SQL("{}::pg_catalog.text[]").format(expression)
        return expression

    def text(self, expression: sql.Composable) -> sql.Composable:
        """The expression, of this column's type and not null, as text. `concat` is not a cast, which an owner could replace."""
        form = "pg_catalog.concat({})" if self.base_kind == "e" else "{}::pg_catalog.text"
        return sql.SQL(form).format(expression)

    def parameter(self, *, array: bool = False) -> sql.Composable:
        """A placeholder for a key of this column (or a list of them), of a type that lets its index be used."""
        if self.base_name in _INTEGERS:
            name = "pg_catalog.int8"  # compares with every integer by index, and holds every value that is asked for
        elif self.base_name in ("text", "varchar"):
            name = "pg_catalog.text"
        else:
            name = self.bare_type
        # The type's name is from format_type, which quotes what needs quotes.
        name = name.replace("%", "%%")
        return sql.SQL("%s::" + name + ("[]" if array else ""))

    def operator(self, symbol: str) -> sql.Composable:
        """The comparison that the column's index is made for, even if the search path leads to other operators."""
        schema = self.base_schema if self.base_name == "citext" else "pg_catalog"
        return sql.SQL("OPERATOR({}.{})").format(identifier(schema), sql.SQL(symbol))

    def described(self) -> SourceColumn:
        """The column as the Protocol gives it."""
        return SourceColumn(
            self.name, self.declared_type, not self.not_null, self.filter_types, self.key_type is not None
        )


_DRIVER_ARRAYS: Final = frozenset(info.array_oid for info in psycopg.adapters.types if info.array_oid)


@dataclass(frozen=True, slots=True)
class Relation:
    """A table, view or the like."""

    oid: int
    schema: str
    name: str
    kind: str
    """`pg_class.relkind`: r table, p partitioned, v view, m materialized view, f foreign."""
    visible: bool
    columns: tuple[ColumnInfo, ...]

    @property
    def identifier(self) -> sql.Identifier:
        """Its qualified name in a statement that is executed with parameters."""
        return identifier(self.schema, self.name)

    @property
    def label(self) -> str:
        """Its qualified name in a message."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def is_view(self) -> bool:
        """Whether it is a view, materialized or not."""
        return self.kind in "vm"

    @property
    def is_plain_view(self) -> bool:
        """Whether its rows are computed at each read."""
        return self.kind == "v"

    def described(self, estimate: int | None) -> SourceTable:
        """The table as the Protocol gives it."""
        name = spelling(self.schema, self.name, visible=self.visible)
        return SourceTable(name, tuple(column.described() for column in self.columns), self.is_view, estimate)

    def find_columns(self, names: tuple[str, ...]) -> list[ColumnInfo]:
        """The columns of these names, each exactly or folded as PostgreSQL folds. Names all that are missing."""
        by_name = {column.name: column for column in self.columns}
        found = [by_name.get(name) or by_name.get(folded(name)) for name in names]
        missing = list(dict.fromkeys(name for name, column in zip(names, found, strict=True) if column is None))
        if missing:
            listed = ", ".join(repr(name) for name in missing)
            raise SourceTableNotFound(
                f"Table {self.label} has no column {listed}.",
                resolution=suggestion(missing, list(by_name)) or SourceTableNotFound.default_resolution,
                columns=missing,
            )
        return [column for column in found if column is not None]

    def require_readable(self, columns: list[ColumnInfo], server: Server) -> None:
        """Raises SourceAccessDenied with the GRANT that is missing for these columns."""
        denied = list(dict.fromkeys(column.name for column in columns if not column.readable))
        if not denied:
            return
        listed = ", ".join(map(quoted, denied))
        what = f"({listed}) " if len(denied) < len(self.columns) else ""
        grant = f"GRANT SELECT {what}ON {self.label} TO {quoted(server.grantee)};"
        raise access_denied(server, self.label, grant=grant)

    def key(self, name: str) -> ColumnInfo:
        """The primary key column. Raises SourceTableNotFound, SourceRejected."""
        column = self.find_columns((name,))[0]
        if column.key_type is None:
            raise SourceRejected(
                f"Column {column.name!r} of {self.label} is of type {column.declared_type}, which can be no primary key.",
                resolution="Choose a column of an integer, text, uuid, numeric, date, timestamp or enum type.",
            )
        return column


# As `pg_table_is_visible`, by the role's own search path instead of the one that is pinned.
_VISIBLE: Final = """
LATERAL (
    SELECT n.nspname = (
        SELECT h.nspname FROM pg_catalog.unnest(%(path)s::pg_catalog.text[]) WITH ORDINALITY AS s(name, place)
        JOIN pg_catalog.pg_namespace h ON h.nspname = s.name
        JOIN pg_catalog.pg_class o ON o.relnamespace = h.oid AND o.relname = c.relname
        ORDER BY s.place LIMIT 1
    ) IS TRUE
) AS v(visible)
"""

_RELATIONS: Final = """
SELECT c.oid, n.nspname, c.relname, c.relkind::pg_catalog.text, v.visible,
       pg_catalog.has_schema_privilege(n.oid, 'USAGE'), pg_catalog.has_any_column_privilege(c.oid, 'SELECT')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, <visible>
WHERE c.relkind = ANY ('{r,p,v,m,f}'::pg_catalog."char"[])
  AND (c.relname = ANY (%(names)s::pg_catalog.text[]) AND v.visible
       OR EXISTS (SELECT FROM ROWS FROM (pg_catalog.unnest(%(schemas)s::pg_catalog.text[]),
                                         pg_catalog.unnest(%(tables)s::pg_catalog.text[])) AS g(s, t)
                  WHERE g.s = n.nspname AND g.t = c.relname))
""".replace("<visible>", _VISIBLE)

_COLUMNS: Final = """
WITH RECURSIVE base(number, type_oid, modifier) AS (
    SELECT attnum, atttypid, atttypmod FROM pg_catalog.pg_attribute
    WHERE attrelid = %(oid)s::pg_catalog.oid AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT b.number, t.typbasetype, CASE WHEN t.typtypmod <> -1 THEN t.typtypmod ELSE b.modifier END
    FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.type_oid WHERE t.typtype = 'd'
), heirs(oid) AS (  -- what inherits from a table, but partitions, may allow nulls that the table does not
    SELECT h.inhrelid FROM pg_catalog.pg_inherits h JOIN pg_catalog.pg_class p ON p.oid = h.inhparent
    WHERE h.inhparent = %(oid)s::pg_catalog.oid AND p.relkind <> 'p'
    UNION
    SELECT h.inhrelid FROM pg_catalog.pg_inherits h JOIN heirs ON h.inhparent = heirs.oid
)
SELECT a.attnum, a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod),
       -- an outer join makes nulls of a domain without them; a constraint may not have been validated
       (a.attnotnull OR d.typnotnull AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_class c WHERE c.oid = a.attrelid AND c.relkind = ANY ('{v,m}'::pg_catalog."char"[])
       )) AND NOT EXISTS (
           SELECT FROM pg_catalog.pg_constraint k
           WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND NOT k.convalidated AND k.conkey[1] = a.attnum
       ) AND NOT EXISTS (
           SELECT FROM heirs JOIN pg_catalog.pg_attribute h ON h.attrelid = heirs.oid
           WHERE h.attname = a.attname AND NOT h.attnotnull AND NOT d.typnotnull
       ),
       pg_catalog.has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       CASE WHEN n.nspname = 'pg_catalog' OR t.typname = 'citext' AND EXISTS (
           SELECT FROM pg_catalog.pg_depend p JOIN pg_catalog.pg_extension e ON e.oid = p.refobjid
           WHERE p.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND p.objid = t.oid AND p.deptype = 'e'
             AND p.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND e.extname = 'citext'
       ) THEN t.typname::pg_catalog.text ELSE '' END,
       n.nspname, t.typtype::pg_catalog.text, t.typcategory::pg_catalog.text,
       pg_catalog.format_type(t.oid, b.modifier), pg_catalog.format_type(t.oid, -1), b.modifier,
       CASE WHEN t.typcategory = 'A' AND t.typlen = -1 THEN t.typelem::pg_catalog.int8 ELSE 0 END,
       t.oid::pg_catalog.int8
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type d ON d.oid = a.atttypid
JOIN base b ON b.number = a.attnum
JOIN pg_catalog.pg_type t ON t.oid = b.type_oid AND t.typtype <> 'd'
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
WHERE a.attrelid = %(oid)s::pg_catalog.oid
ORDER BY a.attnum
"""

_TABLES: Final = """
SELECT n.nspname, c.relname, c.relkind::pg_catalog.text, v.visible,
       CASE WHEN c.reltuples >= 0 AND c.relkind <> 'v' THEN c.reltuples::pg_catalog.int8 END
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, <visible>
WHERE c.relkind = ANY ('{r,p,v,m,f}'::pg_catalog."char"[]) AND NOT c.relispartition
  AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
  AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_any_column_privilege(c.oid, 'SELECT')
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend p
                  WHERE p.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND p.objid = c.oid AND p.deptype = 'e')
ORDER BY CASE WHEN v.visible THEN c.relname::pg_catalog.text
              ELSE pg_catalog.concat(n.nspname, '.', c.relname) END COLLATE pg_catalog."C"
LIMIT %(limit)s
""".replace("<visible>", _VISIBLE)


def list_tables(connection: psycopg.Connection[Any], limit: int) -> list[SourceTable]:
    """Up to `limit` readable tables, by name, without columns."""
    rows = connection.execute(_TABLES, {"limit": limit, "path": role_schemas(connection)}).fetchall()
    return [
        SourceTable(spelling(schema, name, visible=visible), (), kind in "vm", estimate)
        for schema, name, kind, visible, estimate in rows
    ]


def _in_short(column: ColumnInfo, path: list[str]) -> ColumnInfo:
    """The column with its declared type as users write it: without a schema that is in their search path."""
    for schema in path:
        prefixes = (f"{schema}.", f"{quoted(schema)}.")
        if column.declared_type.startswith(prefixes):
            length = next(len(prefix) for prefix in prefixes if column.declared_type.startswith(prefix))
            return replace(column, declared_type=column.declared_type[length:])
    return column


def resolve_names(connection: psycopg.Connection[Any], names: Iterable[str]) -> dict[str, int]:
    """The OIDs of the tables that these names mean at this moment, in two round trips; those that mean none are left out."""
    candidates = {name: readings(name) for name in names}
    if not candidates:
        return {}
    pairs = [pair for readings_of_one in candidates.values() for pair in readings_of_one]
    found = _find_candidates(connection, pairs, role_schemas(connection))
    chosen = {name: _choose(pairs, found) for name, pairs in candidates.items()}
    return {name: row[0] for name, row in chosen.items() if row is not None}


def _find_candidates(
    connection: psycopg.Connection[Any], candidates: Sequence[tuple[str | None, str]], path: Sequence[str]
) -> list[tuple[Any, ...]]:
    qualified = [(schema, name) for schema, name in candidates if schema is not None]
    return connection.execute(
        _RELATIONS,
        {
            "names": [name for schema, name in candidates if schema is None],
            "schemas": [schema for schema, _ in qualified],
            "tables": [name for _, name in qualified],
            "path": path,
        },
    ).fetchall()


def _choose(candidates: Sequence[tuple[str | None, str]], found: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """The row of the likeliest reading of a name that there is."""
    for schema, name in candidates:
        for row in found:
            _oid, row_schema, row_name, _kind, visible, *_rights = row
            if row_name == name and (visible if schema is None else row_schema == schema):
                return row
    return None


def find_relation(connection: psycopg.Connection[Any], given: str, server: Server) -> Relation:
    """The table that this name means. Raises SourceTableNotFound, SourceAccessDenied."""
    candidates = readings(given)
    path = role_schemas(connection)
    try:
        found = _find_candidates(connection, candidates, path)
    except psycopg.errors.UntranslatableCharacter:  # no table has a name that the database's encoding cannot hold
        raise SourceTableNotFound(
            f"There is no table {given!r} in database {server.database!r}, whose encoding lacks a character of it.",
            table=given,
        ) from None
    chosen = _choose(candidates, found)
    if chosen is not None:
        oid, schema, name, kind, visible, schema_usage, readable = chosen
        label = f"{quoted(schema)}.{quoted(name)}"
        grants = [] if schema_usage else [f"GRANT USAGE ON SCHEMA {quoted(schema)} TO {quoted(server.grantee)};"]
        if not readable:
            grants.append(f"GRANT SELECT ON {label} TO {quoted(server.grantee)};")
        if grants:
            raise access_denied(server, label, grant=" ".join(grants))
        columns = connection.execute(_COLUMNS, {"oid": oid}).fetchall()
        found_columns = tuple(_in_short(ColumnInfo(*column), path) for column in columns)
        return Relation(oid, schema, name, kind, visible, found_columns)
    known = [table.name for table in list_tables(connection, 2000)]
    raise SourceTableNotFound(
        f"There is no table {given!r} in database {server.database!r}.",
        resolution=suggestion([given], known) or SourceTableNotFound.default_resolution,
        table=given,
    )
