"""The publication that says of which tables PostgreSQL logs changes for us: read, made, mended, and kept to what is wanted.

An administrator may have made it instead of us, with more tables or for all tables: then it is used as it is, and changed
only where it would leave changes out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.sql import SQL

from embedd_dagster.errors import EmbeddError, SourceUnavailable
from embedd_dagster.sources.changes import FollowedTable
from embedd_dagster.sources.postgresql_errors import Server, quoted, translate
from embedd_dagster.sources.postgresql_followed import Followed
from embedd_dagster.sources.postgresql_prerequisites import Problem, rejected

_WAIT_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.02
_FILTERS: Final = 150000  # row filters, column lists and schemas of publications
_GENERATED: Final = 180000


@dataclass(frozen=True, slots=True)
class _Membership:
    row: int
    """Of the catalog's row, another one if the table was taken out and in again."""
    schema: str
    name: str
    is_filtered: bool
    columns: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication as it stands."""

    oid: int
    is_ours: bool
    """Whether we may change it."""
    all_tables: bool
    via_root: bool
    publishes_all: bool
    """Inserts, updates, deletes and truncates."""
    publishes_generated: bool
    schemas: frozenset[int]
    tables: dict[int, _Membership]

    def stamp(self, followed: Followed) -> int | None:
        """By what the table is published, whole; another value if it was taken out meanwhile. None where it is not."""
        own = self.tables.get(followed.relation.oid)
        if own is not None:
            is_whole = not own.is_filtered and (own.columns is None or followed.key.number in own.columns)
            return own.row if is_whole else None
        if self.all_tables or self.schemas & followed.state.schemas:
            return -self.oid
        above = [self.tables[oid] for oid in followed.state.ancestors if oid in self.tables]
        if above and not any(one.is_filtered or one.columns is not None for one in above):
            return above[0].row
        return None

    def lacks(self, followed: Iterable[Followed]) -> list[str]:
        """What would be left out of these tables' changes: settings, as SQL."""
        followed = list(followed)
        found = []
        if not self.publishes_all:
            found.append("publish = 'insert, update, delete, truncate'")
        if not self.via_root and any(one.relation.kind == "p" or one.state.ancestors for one in followed):
            found.append("publish_via_partition_root = true")
        # From version 18 on, and then an UPDATE of a table with such columns and a full identity would fail besides.
        if not self.publishes_generated and any(member.stored for one in followed for member in one.state.members):
            found.append("publish_generated_columns = stored")
        return found


_PUBLICATION: Final = """
SELECT p.oid::pg_catalog.int8, pg_catalog.pg_has_role(p.pubowner, 'USAGE'), p.puballtables, p.pubviaroot,
       p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate, {generated}, {schemas}
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
    """The publication of this name, in two round trips; None where there is none."""
    version = connection.info.server_version
    statement = SQL(_PUBLICATION).format(
        generated=SQL("p.pubgencols = 's'") if version >= _GENERATED else SQL("true"),
        schemas=_SCHEMAS if version >= _FILTERS else SQL("ARRAY[]::pg_catalog.int8[]"),
    )
    row = connection.execute(statement, [name]).fetchone()
    if row is None:
        return None
    narrowing = SQL("r.prqual IS NOT NULL, r.prattrs::pg_catalog.int2[]")
    statement = SQL(_TABLES).format(filter=narrowing if version >= _FILTERS else SQL("false, NULL"))
    tables = {
        oid: _Membership(own, schema, table, is_filtered, None if columns is None else frozenset(columns))
        for oid, own, schema, table, is_filtered, columns in connection.execute(statement, [row[0]]).fetchall()
    }
    oid, is_ours, all_tables, via_root, publishes_all, publishes_generated, in_schemas = row
    return Publication(
        oid, is_ours, all_tables, via_root, publishes_all, publishes_generated, frozenset(in_schemas), tables
    )


@dataclass(slots=True)
class Published:
    """What became of the tables."""

    is_new: bool
    """Whether there was no publication: whatever the slot has seen meanwhile, it cannot tell of our tables."""
    stamps: dict[FollowedTable, int] = field(default_factory=dict)
    joined: set[FollowedTable] = field(default_factory=set)
    """Tables of which changes may not have been published until now."""
    refused: dict[FollowedTable, EmbeddError] = field(default_factory=dict)


class Publisher:
    """Keeps the publication of one name to the tables that are wanted.

    Every table is its own statement: one that is locked or gone does not hold up the others.
    """

    def __init__(self, name: str, server: Server) -> None:
        self._name = name
        self._identifier = sql.Identifier(name)
        self._server = server
        self._held_up: dict[int, frozenset[str]] = {}
        """Tables that could not join, and the transactions that they wait for."""

    def publish(self, connection: psycopg.Connection[Any], wanted: Sequence[Followed], *, into_slot: bool) -> Published:
        """Publishes these tables, which must be fit for it, and no others as far as we may.

        `into_slot`: whether there is a slot to go on with. One that is made later waits for all that is open by itself.
        """
        publication = read_publication(connection, self._name)
        done = Published(is_new=publication is None)
        if publication is None:
            self._create(connection)
            publication = self._read_again(connection)
        publication = self._drop_unwanted(connection, publication, {one.relation.oid for one in wanted})
        if lacking := publication.lacks(wanted):
            self._mend(connection, publication, wanted, lacking, done)
        self._add_missing(connection, publication, wanted, done)
        if done.joined:
            if into_slot and not done.is_new and publication.is_ours:
                self._await_writers(connection, wanted, done)
            publication = self._read_again(connection)
        for one in wanted:
            stamp = publication.stamp(one)
            if one.table not in done.refused and stamp is not None:
                done.stamps[one.table] = stamp
        return done

    def drop(self, connection: psycopg.Connection[Any]) -> None:
        """The publication is gone, if it was ours."""
        publication = read_publication(connection, self._name)
        if publication is not None and publication.is_ours:
            connection.execute(SQL("DROP PUBLICATION IF EXISTS {}").format(self._identifier))

    def _create(self, connection: psycopg.Connection[Any]) -> None:
        options = ["publish_via_partition_root = true"]
        if connection.info.server_version >= _GENERATED:
            options.append("publish_generated_columns = stored")
        statement = SQL("CREATE PUBLICATION {} WITH ({})").format(self._identifier, _listed(options))
        connection.execute(statement)

    def _read_again(self, connection: psycopg.Connection[Any]) -> Publication:
        publication = read_publication(connection, self._name)
        if publication is None:
            raise SourceUnavailable(f"Publication {self._name!r} at {self._server} was dropped just now.")
        return publication

    def _drop_unwanted(
        self, connection: psycopg.Connection[Any], publication: Publication, wanted: set[int]
    ) -> Publication:
        if not publication.is_ours:
            return publication
        for oid in publication.tables.keys() - wanted:
            self._drop_table(connection, publication.tables[oid])
        kept = {oid: member for oid, member in publication.tables.items() if oid in wanted}
        return replace(publication, tables=kept)

    def _drop_table(self, connection: psycopg.Connection[Any], member: _Membership) -> None:
        connection.execute(self._alter("DROP TABLE ONLY {}", sql.Identifier(member.schema, member.name)))

    def _mend(
        self,
        connection: psycopg.Connection[Any],
        publication: Publication,
        wanted: Sequence[Followed],
        lacking: list[str],
        done: Published,
    ) -> None:
        if publication.is_ours:
            connection.execute(self._alter("SET ({})", _listed(lacking)))
            done.joined.update(one.table for one in wanted)
            return
        statement = f"ALTER PUBLICATION {quoted(self._name)} SET ({', '.join(lacking)});"
        problem = Problem(
            f"publication {self._name!r}, which is not ours to change, leaves some of them out", statement
        )
        done.refused.update({one.table: rejected(f"table {one.relation.label}", [problem]) for one in wanted})

    def _add_missing(
        self, connection: psycopg.Connection[Any], publication: Publication, wanted: Sequence[Followed], done: Published
    ) -> None:
        missing: dict[int, list[Followed]] = {}
        for one in wanted:
            if one.table not in done.refused and publication.stamp(one) is None:
                missing.setdefault(one.relation.oid, []).append(one)
        for oid, group in missing.items():
            first, tables = group[0], [one.table for one in group]
            try:
                self._require_right(publication, first)
                self._require_no_holdup(connection, first)
                self._add(connection, publication, first)
            except psycopg.Error as error:
                if connection.closed:
                    raise
                refusal = translate(error, self._server, relation=first.relation.label)
                done.refused.update(dict.fromkeys(tables, refusal))
            except EmbeddError as error:
                done.refused.update(dict.fromkeys(tables, error))
            else:
                self._held_up.pop(oid, None)
                done.joined.update(tables)

    def _require_right(self, publication: Publication, one: Followed) -> None:
        if publication.is_ours and one.state.is_owned:
            return
        statement = f"ALTER PUBLICATION {quoted(self._name)} ADD TABLE {one.relation.label};"
        reason = f"only its owner {one.state.owner!r} may publish it"
        raise rejected(f"table {one.relation.label}", [Problem(reason, statement)])

    def _add(self, connection: psycopg.Connection[Any], publication: Publication, one: Followed) -> None:
        table = sql.Identifier(one.relation.schema, one.relation.name)
        with connection.transaction():
            if one.relation.oid in publication.tables:  # with a filter, or without our column
                connection.execute(self._alter("DROP TABLE ONLY {}", table))
            connection.execute(self._alter("ADD TABLE ONLY {}", table))

    def _require_no_holdup(self, connection: psycopg.Connection[Any], one: Followed) -> None:
        held_up = self._held_up.get(one.relation.oid)
        if held_up and held_up & _writers(connection, one):
            raise self._held_up_error(one)

    def _await_writers(self, connection: psycopg.Connection[Any], wanted: Sequence[Followed], done: Published) -> None:
        """Holds back tables until the transactions end that wrote to them before they were published.

        What those wrote is never published, and no comparison can read it before they end. One that lasts keeps its
        table out: in the publication are only tables of which nothing can be missing.
        """
        waiting = {one.relation.oid: (one, _writers(connection, one)) for one in wanted if one.table in done.joined}
        deadline = time.monotonic() + _WAIT_SECONDS
        while waiting := {oid: (one, left) for oid, (one, left) in waiting.items() if left}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
            waiting = {oid: (one, left & _writers(connection, one)) for oid, (one, left) in waiting.items()}
        publication = self._read_again(connection) if waiting else None
        for oid, (one, left) in waiting.items():
            if publication is not None and oid in publication.tables:
                self._drop_table(connection, publication.tables[oid])
            self._held_up[oid] = left
            tables = [other.table for other in wanted if other.relation.oid == oid]
            done.joined.difference_update(tables)
            done.refused.update(dict.fromkeys(tables, self._held_up_error(one)))

    def _held_up_error(self, one: Followed) -> EmbeddError:
        return SourceUnavailable(
            f"Table {one.relation.label} is followed when a transaction that has written to it, and is open for long, ends.",
            resolution="Nothing to do: it is tried again. SELECT pid, xact_start, query FROM pg_stat_activity shows it.",
        )

    def _alter(self, action: str, *parts: sql.Composable) -> sql.Composed:
        return SQL("ALTER PUBLICATION {} ").format(self._identifier) + SQL(action).format(*parts)


def _listed(options: list[str]) -> SQL:
    return SQL(", ".join(options))


# Also of prepared transactions, which have no process. The lock is kept until the transaction ends.
_WRITERS: Final = """
SELECT DISTINCT l.virtualtransaction FROM pg_catalog.pg_locks l
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
  AND l.relation = ANY (%s::pg_catalog.oid[])
  AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
"""


def _writers(connection: psycopg.Connection[Any], one: Followed) -> frozenset[str]:
    rows = connection.execute(_WRITERS, [[member.oid for member in one.state.members]]).fetchall()
    return frozenset(row[0] for row in rows)
