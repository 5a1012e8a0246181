"""Whether CDC is possible for a table: its requirements, and the statements that meet them.

Publishing a table whose replica identity does not suffice makes its owner's own UPDATE and DELETE fail. So each rule of
PostgreSQL for that is checked here before a table is published, and again at every subscribe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from embedd_dagster.connectors.postgresql.cdc.prerequisites import PREREQUISITES, Prerequisites, Problem, rejection
from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.connectors.postgresql.introspection import find_relation
from embedd_dagster.errors import SourceTableNotFound
from embedd_dagster.protocols.cdc import CdcTable

_BATCH: Final = "Use sync_mode batch for it."
_KINDS: Final = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
_GENERATED_ARE_LOGGED: Final = 180000  # the stored ones


@dataclass(frozen=True, slots=True)
class Member:
    """A table of a partition tree, which for a plain table is itself alone."""

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    file: int
    """Changes whenever the table is rewritten, which the log does not report as changes of rows."""
    identity_kind: str
    """`pg_class.relreplident`: d default, i index, f full, n nothing."""
    identity: frozenset[str]
    """The columns of the index that is the replica identity; none where it is full, or there is no such index."""
    primary_key: frozenset[str]
    stored: frozenset[str]
    """Generated columns that are stored."""
    virtual: frozenset[str]
    """Generated columns that are not."""

    @property
    def label(self) -> str:
        """Its qualified name in a message or a statement."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    def holds(self, column: str, version: int) -> bool:
        """Whether every UPDATE and DELETE can be logged, and logs this column."""
        if self.identity_kind == "f":
            return not (version >= 180000 and self.virtual)  # from 18 on, such a table's UPDATE fails if published
        return column in self.identity


@dataclass(frozen=True, slots=True)
class TableDetails:
    """A table with all that matters for publishing it."""

    members: tuple[Member, ...]
    """Itself first, then its partitions at every level."""
    is_owned: bool
    owner: str
    ancestors: tuple[int, ...]
    """The partitioned tables that it is a partition of."""
    schemas: frozenset[int]
    """Of itself and its ancestors."""
    columns: dict[str, list[int]]
    """Number, type and type modifier of each: they differ if the column was altered, or if another took its name."""
    is_inherited: bool
    """Whether other tables inherit from it, not as partitions: its rows are theirs too."""
    hides_rows: bool
    """Whether policies of row-level security decide which of its rows our role sees."""
    hides_rows_from_owner: bool
    """Whether they do so for its owner as well."""

    @property
    def table(self) -> Member:
        """The table itself."""
        return self.members[0]

    @property
    def files(self) -> frozenset[tuple[int, int]]:
        """Where its rows are stored: differs if partitions were added, removed or rewritten."""
        return frozenset((member.oid, member.file) for member in self.members)


_STATES: Final = """
SELECT w.oid::pg_catalog.int8, m.oid::pg_catalog.int8, n.nspname, c.relname, c.relkind::pg_catalog.text,
       c.relpersistence::pg_catalog.text, c.relfilenode::pg_catalog.int8, c.relreplident::pg_catalog.text,
       COALESCE(i.identity, '{}'), COALESCE(i.primary_key, '{}'), COALESCE(g.stored, '{}'), COALESCE(g.virtual, '{}'),
       pg_catalog.pg_has_role(c.relowner, 'USAGE'), pg_catalog.pg_get_userbyid(c.relowner),
       u.oids, u.schemas, k.names, k.entries,
       c.relkind = 'r' AND EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhparent = c.oid),
       pg_catalog.row_security_active(w.oid), c.relforcerowsecurity
FROM pg_catalog.unnest(%(oids)s::pg_catalog.oid[]) AS w(oid)
CROSS JOIN LATERAL (
    SELECT w.oid UNION SELECT t.relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree(w.oid) AS t
) AS m(oid)
JOIN pg_catalog.pg_class c ON c.oid = m.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (
    -- Not the columns that an index merely includes; and no index that PostgreSQL would not take for an identity.
    SELECT pg_catalog.array_agg(a.attname::pg_catalog.text) FILTER (
               WHERE CASE c.relreplident WHEN 'd' THEN x.indisprimary WHEN 'i' THEN x.indisreplident ELSE false END
           ) AS identity,
           pg_catalog.array_agg(a.attname::pg_catalog.text) FILTER (WHERE x.indisprimary) AS primary_key
    FROM pg_catalog.pg_index x
    JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
         AND a.attnum = ANY ((x.indkey::pg_catalog.int2[])[0:x.indnkeyatts - 1])
    WHERE x.indrelid = c.oid AND x.indisunique AND x.indisvalid AND x.indimmediate AND x.indpred IS NULL
) AS i ON true
LEFT JOIN LATERAL (
    SELECT pg_catalog.array_agg(a.attname::pg_catalog.text) FILTER (WHERE a.attgenerated = 's') AS stored,
           pg_catalog.array_agg(a.attname::pg_catalog.text) FILTER (WHERE a.attgenerated = 'v') AS virtual
    FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> ''
) AS g ON true
LEFT JOIN LATERAL (
    SELECT pg_catalog.array_agg(p.oid::pg_catalog.int8) FILTER (WHERE p.oid <> w.oid) AS oids,
           pg_catalog.array_agg(p.relnamespace::pg_catalog.int8) AS schemas
    FROM pg_catalog.pg_class p
    WHERE m.oid = w.oid
      AND (p.oid = w.oid OR p.oid IN (SELECT s.relid FROM pg_catalog.pg_partition_ancestors(w.oid) AS s(relid)))
) AS u ON true
LEFT JOIN LATERAL (
    SELECT pg_catalog.array_agg(a.attname::pg_catalog.text) AS names,
           pg_catalog.array_agg(ARRAY[a.attnum::pg_catalog.int8, a.atttypid::pg_catalog.int8, a.atttypmod]) AS entries
    FROM pg_catalog.pg_attribute a
    WHERE m.oid = w.oid AND a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped
) AS k ON true
ORDER BY w.oid, m.oid <> w.oid, m.oid
"""


def read_table_details(connection: psycopg.Connection[Any], oids: Iterable[int]) -> dict[int, TableDetails]:
    """The tables of these OIDs that there are, in one round trip."""
    rows = connection.execute(_STATES, {"oids": sorted(set(oids))}).fetchall()
    members: dict[int, list[Member]] = {}
    heads: dict[int, Sequence[Any]] = {}
    for row in rows:
        sets = [frozenset(values) for values in row[8:12]]
        members.setdefault(row[0], []).append(Member(*row[1:8], *sets))
        heads.setdefault(row[0], row)
    return {
        oid: TableDetails(
            tuple(members[oid]),
            is_owned=row[12],
            owner=row[13],
            ancestors=tuple(row[14] or ()),
            schemas=frozenset(row[15] or ()),
            columns=dict(zip(row[16] or (), row[17] or (), strict=True)),
            is_inherited=row[18],
            hides_rows=row[19],
            hides_rows_from_owner=row[20],
        )
        for oid, row in heads.items()
    }


def table_problems(
    connection: psycopg.Connection[Any], details: TableDetails, column: str, server: Server
) -> list[Problem]:
    """Why CDC is not possible for this table and key column; the owner is not considered."""
    version = connection.info.server_version
    table = details.table
    if table.kind in _KINDS:
        return [Problem(f"it is {_KINDS[table.kind]}", advice=_BATCH)]
    if table.persistence == "t":
        return [Problem("it is temporary", advice=_BATCH)]
    if details.is_inherited:
        return [Problem("other tables inherit from it, and their rows would show in it", advice=_BATCH)]
    found = []
    if details.hides_rows:
        found.append(row_security_problem(details, server))
    if column in table.virtual or (column in table.stored and version < _GENERATED_ARE_LOGGED):
        found.append(Problem(f"its column {column!r} is generated, and so is not logged", advice=_BATCH))
    for member in details.members:
        if member.persistence == "u":
            found.append(Problem(f"{member.label} is unlogged", f"ALTER TABLE {member.label} SET LOGGED;"))
        if member.kind == "f":
            found.append(Problem(f"its partition {member.label} is a foreign table", advice=_BATCH))
    if table.kind == "p" and column not in table.primary_key:
        # The identity of one partition is not that of the next; only a primary key is given to each that is made.
        return [*found, _without_primary_key(connection, table, column)]
    for member in details.members:
        if (member is table or member.kind == "r") and not member.holds(column, version):
            found.append(_identity_problem(connection, member, column, version))
    return found


_INDEX: Final = """
SELECT i.relname FROM pg_catalog.pg_index x
JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
JOIN pg_catalog.pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
WHERE x.indrelid = %s::pg_catalog.oid AND x.indisunique AND x.indisvalid AND x.indimmediate AND x.indpred IS NULL
  AND x.indnkeyatts = 1 AND a.attname = %s AND a.attnotnull
ORDER BY i.relname LIMIT 1
"""


def _identity_problem(connection: psycopg.Connection[Any], member: Member, column: str, version: int) -> Problem:
    if member.identity_kind == "f":
        reason = f"the replica identity of {member.label} is FULL, which its virtual generated columns forbid"
    elif member.identity_kind == "n":
        reason = f"the replica identity of {member.label} is NOTHING"
    elif not member.identity:
        reason = f"{member.label} has no replica identity, as it has no primary key"
    else:
        reason = f"the replica identity of {member.label} does not hold the column {column!r}"
    alter = f"ALTER TABLE {member.label} REPLICA IDENTITY"
    if column in member.primary_key:
        return Problem(reason, f"{alter} DEFAULT;")
    row = connection.execute(_INDEX, [member.oid, column]).fetchone()
    if row:
        return Problem(reason, f"{alter} USING INDEX {quoted(row[0])};")
    if version < _GENERATED_ARE_LOGGED or not member.virtual:
        return Problem(reason, f"{alter} FULL;")
    return Problem(
        reason, advice=f"Make {column!r} NOT NULL with a unique index of its own, and that its REPLICA IDENTITY."
    )


_PARTITION_COLUMNS: Final = """
SELECT a.attname FROM pg_catalog.pg_partitioned_table p
CROSS JOIN LATERAL pg_catalog.unnest(p.partattrs::pg_catalog.int2[]) WITH ORDINALITY AS k(number, position)
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = k.number AND k.number > 0
WHERE p.partrelid = %s::pg_catalog.oid ORDER BY k.position
"""


def _without_primary_key(connection: psycopg.Connection[Any], table: Member, column: str) -> Problem:
    reason = f"it is partitioned, and its primary key does not hold the column {column!r}"
    if not table.primary_key:
        names = [row[0] for row in connection.execute(_PARTITION_COLUMNS, [table.oid]).fetchall()]
        if None not in names:  # otherwise it is partitioned by an expression, which a primary key cannot contain
            listed = ", ".join(map(quoted, dict.fromkeys([column, *names])))
            return Problem(reason, f"ALTER TABLE {table.label} ADD PRIMARY KEY ({listed});")
    return Problem(reason, advice=_BATCH)


def row_security_problem(details: TableDetails, server: Server) -> Problem:
    """Policies decide which rows our role sees, and the log does not report when that changes."""
    reason = f"row-level security decides which rows the user {server.user!r} sees, and the log does not say when that changes"
    statement = f"ALTER ROLE {quoted(server.user)} BYPASSRLS;"
    if details.is_owned and details.hides_rows_from_owner:
        statement = f"ALTER TABLE {details.table.label} NO FORCE ROW LEVEL SECURITY;"
    return Problem(reason, statement, "Use sync_mode batch for it, or let the user see all of its rows.")


def owner_problem(details: TableDetails, server: Server) -> Problem:
    """We may not publish the table: only its owner may."""
    owner, user = quoted(details.owner), quoted(server.grantee)
    return Problem(
        f"only its owner {details.owner!r} may publish it",
        f"GRANT {owner} TO {user};",
        f"Instead of the owner's role you may give it the table: ALTER TABLE {details.table.label} OWNER TO {user};",
    )


# A publication that an administrator made in our name replaces the right to make it.
_PUBLISHED: Final = """
SELECT EXISTS (SELECT FROM pg_catalog.pg_publication_tables
               WHERE pubname ^@ 'embedd_' AND schemaname = %s AND tablename = %s)
"""


def check_cdc_eligible(connection: psycopg.Connection[Any], cdc_table: CdcTable, server: Server) -> None:
    """Returns when CDC is possible for the table, in any stream. Changes nothing.

    Raises SourceRejected with all that is missing, SourceTableNotFound, SourceAccessDenied.
    """
    relation = find_relation(connection, cdc_table.table, server)
    key = relation.key(cdc_table.primary_key_column)
    row = connection.execute(PREREQUISITES).fetchone()
    prerequisites = Prerequisites(*(row or ()))
    details = read_table_details(connection, [relation.oid]).get(relation.oid)
    if details is None:
        raise SourceTableNotFound(f"Table {relation.label} was dropped just now.", table=cdc_table.table)
    problems = table_problems(connection, details, key.name, server)
    published = connection.execute(_PUBLISHED, [relation.schema, relation.name]).fetchone() == (True,)
    if not published and not details.is_owned and details.table.kind in "rp":
        problems.append(owner_problem(details, server))
    # the name of the slot is not known here: any slot of ours in this database counts
    problems += prerequisites.problems(
        server, for_publication=not published, for_slot=not prerequisites.has_slot_of_ours
    )
    if problems:
        raise rejection(f"table {relation.label}", problems)
