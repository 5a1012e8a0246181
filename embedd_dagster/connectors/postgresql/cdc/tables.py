"""The tables of a stream: resolved in the database by their names, and found again cheaply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from embedd_dagster.connectors.postgresql.cdc.eligibility import TableDetails, read_table_details, table_problems
from embedd_dagster.connectors.postgresql.cdc.prerequisites import rejection
from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.introspection import ColumnInfo, Relation, find_relation, resolve_names
from embedd_dagster.errors import EmbeddError, SourceAccessDenied, SourceRejected, SourceTableNotFound
from embedd_dagster.protocols.cdc import CdcTable


@dataclass(frozen=True, slots=True)
class ResolvedTable:
    """A CDC table, found in the database."""

    table: CdcTable
    relation: Relation
    key: ColumnInfo
    details: TableDetails

    @property
    def oids(self) -> list[int]:
        """The OIDs under which its rows may be logged: its own, its partitions', and those of its partitioned ancestors."""
        return [*(member.oid for member in self.details.members), *self.details.ancestors]


class CdcTables:
    """Finds tables as every source does, and remembers each for as long as its name means the same table."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._known: dict[CdcTable, ResolvedTable] = {}

    def find_eligible(
        self, connection: psycopg.Connection[Any], tables: Sequence[CdcTable]
    ) -> tuple[list[ResolvedTable], dict[CdcTable, EmbeddError]]:
        """The eligible ones as they are now, and an error for each of the others. Two queries if nothing has changed."""
        known = {table: self._known[table] for table in tables if table in self._known}
        meant = resolve_names(connection, {table.table for table in known})
        all_details = _details_of(connection, known.values())
        rejected: dict[CdcTable, EmbeddError] = {}
        found: dict[CdcTable, ResolvedTable] = {}
        for table in tables:
            one = known.get(table)
            details = all_details.get(one.relation.oid) if one else None
            if one and details and meant.get(table.table) == one.relation.oid and _is_same(one, details):
                found[table] = replace(one, details=details)
                continue
            try:
                relation = find_relation(connection, table.table, self._server)
                key = relation.key(table.primary_key_column)
                details = read_table_details(connection, [relation.oid]).get(relation.oid)
                if details is None or key.name not in details.columns:
                    raise SourceTableNotFound(
                        f"Table {relation.label} was dropped or altered just now.", table=table.table
                    )
            except (SourceTableNotFound, SourceAccessDenied, SourceRejected) as error:
                rejected[table] = _renamed(table, one, all_details) or error
            else:
                found[table] = ResolvedTable(table, relation, key, details)
        self._known = {**known, **found}
        for table, one in list(found.items()):
            problems = table_problems(connection, one.details, one.key.name, self._server)
            if problems:
                rejected[table] = rejection(f"table {one.relation.label}", problems)
                del found[table]
        return list(found.values()), rejected

    def hides_rows(self, table: CdcTable) -> bool:
        """Whether our role sees only some rows of a table, as last found."""
        one = self._known.get(table)
        return one is not None and one.details.hides_rows


def _details_of(connection: psycopg.Connection[Any], known: Iterable[ResolvedTable]) -> dict[int, TableDetails]:
    known = list(known)
    if not known:
        return {}
    return read_table_details(connection, [one.relation.oid for one in known])


def _is_same(one: ResolvedTable, details: TableDetails) -> bool:
    before, now, key = one.details.table, details.table, one.key.name
    is_same_table = (before.schema, before.name, before.kind) == (now.schema, now.name, now.kind)
    return is_same_table and one.details.columns.get(key) == details.columns.get(key)


def _renamed(
    table: CdcTable, before: ResolvedTable | None, all_details: dict[int, TableDetails]
) -> SourceTableNotFound | None:
    """An error that names the new name of a table that was renamed; None if it was not."""
    details = all_details.get(before.relation.oid) if before else None
    if before is None or details is None or details.table.label == before.relation.label:
        return None
    return SourceTableNotFound(
        f"Table {table.table!r} is not there any more: {before.relation.label} was renamed to {details.table.label}.",
        resolution="Rename it back, or make a vector table of the new name.",
        table=table.table,
    )
