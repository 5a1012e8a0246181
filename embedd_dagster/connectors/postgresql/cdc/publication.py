"""The publication names the tables whose changes PostgreSQL sends us. Read here, changed in `publisher`.

An administrator may have made it instead of us, with more tables, or for all tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.sql import SQL

from embedd_dagster.connectors.postgresql.cdc.tables import ResolvedTable

_FILTERS: Final = 150000  # row filters, column lists and schemas of publications
GENERATED: Final = 180000

PublicationFingerprint = list[int]


@dataclass(frozen=True, slots=True)
class Membership:
    """A table that is named in the publication."""

    row: int
    """The catalog row's OID: changes if the table is removed and added again."""
    schema: str
    name: str
    is_filtered: bool
    columns: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication."""

    oid: int
    version: int
    """Changes whenever its settings are changed, even back to what they had been."""
    is_ours: bool
    """Whether we may change it."""
    all_tables: bool
    via_root: bool
    publishes_all: bool
    """Inserts, updates, deletes and truncates."""
    publishes_generated: bool
    schemas: frozenset[int]
    tables: dict[int, Membership]

    def fingerprint(self, table: ResolvedTable) -> PublicationFingerprint | None:
        """How the whole table is published; differs if it was taken out meanwhile. None if it is not published."""
        oid = table.relation.oid
        own = self.tables.get(oid)
        if own is not None:
            is_whole = not own.is_filtered and (own.columns is None or table.key.number in own.columns)
            return [oid, own.row, self.version] if is_whole else None
        if self.all_tables or self.schemas & table.details.schemas:
            return [oid, self.oid, self.version]
        above = [self.tables[oid] for oid in table.details.ancestors if oid in self.tables]
        if above and not any(one.is_filtered or one.columns is not None for one in above):
            return [oid, above[0].row, self.version]
        return None

    def lacks(self, tables: Iterable[ResolvedTable]) -> list[str]:
        """The settings, as SQL, without which some changes of these tables would be left out."""
        tables = list(tables)
        found = []
        if not self.publishes_all:
            found.append("publish = 'insert, update, delete, truncate'")
        if not self.via_root and any(one.relation.kind == "p" or one.details.ancestors for one in tables):
            found.append("publish_via_partition_root = true")
        # From version 18 on, and then an UPDATE of a table with such columns and a full identity would fail besides.
        if not self.publishes_generated and any(member.stored for one in tables for member in one.details.members):
            found.append("publish_generated_columns = stored")
        return found


_PUBLICATION: Final = """
SELECT p.oid::pg_catalog.int8, p.xmin::pg_catalog.text::pg_catalog.int8, pg_catalog.pg_has_role(p.pubowner, 'USAGE'),
       p.puballtables, p.pubviaroot, p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate, {generated}, {schemas}
FROM pg_catalog.pg_publication p WHERE p.pubname = %s
"""
_SCHEMAS: Final = SQL(
    "ARRAY(SELECT n.pnnspid::pg_catalog.int8 FROM pg_catalog.pg_publication_namespace n WHERE n.pnpubid = p.oid)"
)
_TABLES: Final = """
SELECT r.prrelid::pg_catalog.int8, r.oid::pg_catalog.int8, n.nspname, c.relname, {filter}
FROM pg_catalog.pg_publication_rel r
JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE r.prpubid = %s::pg_catalog.oid
"""


def read_publication(connection: psycopg.Connection[Any], name: str) -> Publication | None:
    """The publication of this name, in two round trips; None if there is none."""
    version = connection.info.server_version
    statement = SQL(_PUBLICATION).format(
        generated=SQL("p.pubgencols = 's'") if version >= GENERATED else SQL("true"),
        schemas=_SCHEMAS if version >= _FILTERS else SQL("ARRAY[]::pg_catalog.int8[]"),
    )
    row = connection.execute(statement, [name]).fetchone()
    if row is None:
        return None
    narrowing = SQL("r.prqual IS NOT NULL, r.prattrs::pg_catalog.int2[]")
    statement = SQL(_TABLES).format(filter=narrowing if version >= _FILTERS else SQL("false, NULL"))
    tables = {
        oid: Membership(own, schema, table, is_filtered, None if columns is None else frozenset(columns))
        for oid, own, schema, table, is_filtered, columns in connection.execute(statement, [row[0]]).fetchall()
    }
    oid, version, is_ours, all_tables, via_root, publishes_all, publishes_generated, in_schemas = row
    return Publication(
        oid, version, is_ours, all_tables, via_root, publishes_all, publishes_generated, frozenset(in_schemas), tables
    )


# Also of prepared transactions, which have no process. The lock is kept until the transaction ends.
_WRITERS: Final = """
SELECT DISTINCT l.virtualtransaction FROM pg_catalog.pg_locks l
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
  AND l.relation = ANY (%s::pg_catalog.oid[])
  AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
"""


def open_writers(connection: psycopg.Connection[Any], one: ResolvedTable) -> frozenset[str]:
    """The open transactions that have written to the table or its partitions, or locked it as for that."""
    rows = connection.execute(_WRITERS, [[member.oid for member in one.details.members]]).fetchall()
    return frozenset(row[0] for row in rows)
