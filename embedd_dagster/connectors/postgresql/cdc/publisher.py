"""Creates and repairs the publication of a stream, and keeps it to the wanted tables.

A publication that an administrator made is used as it is, and changed only where it would leave changes out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg
from psycopg import errors, sql
from psycopg.sql import SQL

from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.prerequisites import Problem, rejection
from embedd_dagster.connectors.postgresql.cdc.publication import (
    GENERATED,
    Membership,
    Publication,
    PublicationFingerprint,
    open_writers,
    read_publication,
)
from embedd_dagster.connectors.postgresql.cdc.tables import ResolvedTable
from embedd_dagster.connectors.postgresql.cdc.visibility import commits_wait_for_a_standby
from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.errors import translate
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.errors import EmbeddError, SourceUnavailable
from embedd_dagster.protocols.cdc import CdcTable

_POLL_SECONDS: Final = 0.02


@dataclass(slots=True)
class PublishResult:
    """What became of the tables."""

    is_new: bool
    """Whether there was no publication: what the slot has read meanwhile has no changes of our tables."""
    newly_subscribed: set[CdcTable] = field(default_factory=set)
    """Tables of which changes may not have been published until now."""
    rejected: dict[CdcTable, EmbeddError] = field(default_factory=dict)
    fingerprints: dict[CdcTable, PublicationFingerprint | None] = field(default_factory=dict)
    """How each is published now; None if it was removed at this moment."""


class Publisher:
    """Keeps the publication of one name to the tables that are wanted.

    Every table is its own statement: a locked or dropped table does not delay the others.
    """

    def __init__(self, name: str, server: Server, options: StreamOptions) -> None:
        self._options = options
        self._name = name
        self._identifier = sql.Identifier(name)
        self._server = server
        self._blocked_by: dict[int, frozenset[str]] = {}
        """Tables that could not be added, and the transactions that they wait for."""

    def publish(
        self,
        connection: psycopg.Connection[Any],
        wanted: Sequence[ResolvedTable],
        known: Mapping[CdcTable, PublicationFingerprint | None],
        *,
        into_slot: bool,
    ) -> PublishResult:
        """Publishes these tables, which must be eligible, and removes others if we have the right to.

        `known`: how the tables were published until now; None if that is not known, and taken to be unchanged.
        `into_slot`: whether a slot exists. A slot that is created later waits for all open transactions by itself.
        """
        publication = read_publication(connection, self._name)
        done = PublishResult(is_new=publication is None)
        if publication is None:
            self._create(connection)
            publication = self._read_again(connection)
        publication = self._drop_unwanted(connection, publication, {one.relation.oid for one in wanted})
        if lacking := publication.lacks(wanted):
            self._repair(connection, publication, wanted, lacking, done)
        unchanged = {table for table, fingerprint in known.items() if fingerprint is None}
        fingerprints = {one.table: publication.fingerprint(one) for one in wanted if one.table not in unchanged}
        done.newly_subscribed.update(
            table for table, fingerprint in fingerprints.items() if fingerprint and known.get(table) != fingerprint
        )
        done.newly_subscribed -= done.rejected.keys()
        self._add_missing(connection, publication, wanted, done)
        if done.newly_subscribed:
            if into_slot and not done.is_new:
                newly_subscribed = [one for one in wanted if one.table in done.newly_subscribed]
                self._withdraw(
                    connection,
                    self._await_writers(connection, newly_subscribed, self._options.writers_seconds),
                    wanted,
                    done,
                )
            publication = self._read_again(connection)
        done.fingerprints = {one.table: publication.fingerprint(one) for one in wanted}
        return done

    def drop(self, connection: psycopg.Connection[Any]) -> None:
        """Drops the publication, if it is ours."""
        publication = read_publication(connection, self._name)
        if publication is not None and publication.is_ours:
            connection.execute(SQL("DROP PUBLICATION IF EXISTS {}").format(self._identifier))

    def _create(self, connection: psycopg.Connection[Any]) -> None:
        options = ["publish_via_partition_root = true"]
        if connection.info.server_version >= GENERATED:
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
            # A locked one is tried again by the next call, a dropped one has left by itself.
            with suppress(errors.LockNotAvailable, errors.UndefinedTable, errors.UndefinedObject):
                self._drop_table(connection, publication.tables[oid])
        kept = {oid: member for oid, member in publication.tables.items() if oid in wanted}
        return replace(publication, tables=kept)

    def _drop_table(self, connection: psycopg.Connection[Any], member: Membership) -> None:
        connection.execute(self._alter("DROP TABLE ONLY {}", sql.Identifier(member.schema, member.name)))

    def _repair(
        self,
        connection: psycopg.Connection[Any],
        publication: Publication,
        wanted: Sequence[ResolvedTable],
        lacking: list[str],
        done: PublishResult,
    ) -> None:
        if publication.is_ours:
            connection.execute(self._alter("SET ({})", _listed(lacking)))
            done.newly_subscribed.update(one.table for one in wanted)
            return
        statement = f"ALTER PUBLICATION {quoted(self._name)} SET ({', '.join(lacking)});"
        problem = Problem(
            f"publication {self._name!r}, which is not ours to change, leaves some of them out", statement
        )
        done.rejected.update({one.table: rejection(f"table {one.relation.label}", [problem]) for one in wanted})

    def _add_missing(
        self,
        connection: psycopg.Connection[Any],
        publication: Publication,
        wanted: Sequence[ResolvedTable],
        done: PublishResult,
    ) -> None:
        missing: dict[int, list[ResolvedTable]] = {}
        for one in wanted:
            if one.table not in done.rejected and publication.fingerprint(one) is None:
                missing.setdefault(one.relation.oid, []).append(one)
        for oid, group in missing.items():
            first, tables = group[0], [one.table for one in group]
            try:
                self._require_right(publication, first)
                self._require_unblocked(connection, first)
                self._add(connection, publication, first)
            except psycopg.Error as error:
                if connection.closed:
                    raise
                reason = translate(error, self._server, relation=first.relation.label)
                done.rejected.update(dict.fromkeys(tables, reason))
            except EmbeddError as error:
                done.rejected.update(dict.fromkeys(tables, error))
            else:
                self._blocked_by.pop(oid, None)
                done.newly_subscribed.update(tables)

    def _require_right(self, publication: Publication, one: ResolvedTable) -> None:
        if publication.is_ours and one.details.is_owned:
            return
        statement = f"ALTER PUBLICATION {quoted(self._name)} ADD TABLE {one.relation.label};"
        reason = f"only its owner {one.details.owner!r} may publish it"
        raise rejection(f"table {one.relation.label}", [Problem(reason, statement)])

    def _add(self, connection: psycopg.Connection[Any], publication: Publication, one: ResolvedTable) -> None:
        table = sql.Identifier(one.relation.schema, one.relation.name)
        with connection.transaction():
            if one.relation.oid in publication.tables:  # with a filter, or without our column
                connection.execute(self._alter("DROP TABLE ONLY {}", table))
            connection.execute(self._alter("ADD TABLE ONLY {}", table))

    def _require_unblocked(self, connection: psycopg.Connection[Any], one: ResolvedTable) -> None:
        blocked_by = self._blocked_by.get(one.relation.oid)
        if blocked_by and blocked_by & open_writers(connection, one):
            raise self._blocked_error(one)

    def await_commits(
        self, connection: psycopg.Connection[Any], wanted: Sequence[ResolvedTable], done: PublishResult
    ) -> None:
        """Call it after creating a slot: withdraws tables of which the slot may have left out a commit.

        A slot gives what commits after it was created. A commit that was logged before, and that still waits for a standby,
        is neither given by the slot nor visible to a sync. It looks like any open transaction, so all of them are awaited.
        If commits do not wait for a standby, they take only a moment, and what stays open for longer will be given.
        """
        may_wait = commits_wait_for_a_standby(connection)
        seconds = self._options.commits_seconds if may_wait else self._options.writers_seconds
        waiting = self._await_writers(connection, wanted, seconds)
        if may_wait:
            self._withdraw(connection, waiting, wanted, done)

    def _await_writers(
        self, connection: psycopg.Connection[Any], newly_subscribed: Sequence[ResolvedTable], seconds: float
    ) -> dict[int, tuple[ResolvedTable, frozenset[str]]]:
        """Waits until the transactions that have written to these tables end; returns those that do not."""
        waiting = {one.relation.oid: (one, open_writers(connection, one)) for one in newly_subscribed}
        deadline = time.monotonic() + seconds
        while waiting := {oid: (one, left) for oid, (one, left) in waiting.items() if left}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
            waiting = {oid: (one, left & open_writers(connection, one)) for oid, (one, left) in waiting.items()}
        return waiting

    def _withdraw(
        self,
        connection: psycopg.Connection[Any],
        waiting: Mapping[int, tuple[ResolvedTable, frozenset[str]]],
        wanted: Sequence[ResolvedTable],
        done: PublishResult,
    ) -> None:
        """Removes tables again, until the transactions end that wrote to them before they were published.

        What those wrote is never published, and a sync cannot read it before they end. So the publication only has tables
        of which nothing can be missing.
        """
        publication = self._read_again(connection) if waiting else None
        for oid, (one, left) in waiting.items():
            if publication is not None and publication.is_ours and one.details.is_owned and oid in publication.tables:
                self._drop_table(connection, publication.tables[oid])
            self._blocked_by[oid] = left
            tables = [other.table for other in wanted if other.relation.oid == oid]
            done.newly_subscribed.difference_update(tables)
            done.rejected.update(dict.fromkeys(tables, self._blocked_error(one)))

    def _blocked_error(self, one: ResolvedTable) -> EmbeddError:
        return SourceUnavailable(
            f"Table {one.relation.label} is followed when a transaction that has written to it, and is open for long, ends.",
            resolution="Nothing to do: it is tried again. SELECT pid, xact_start, query FROM pg_stat_activity shows it.",
        )

    def _alter(self, action: str, *parts: sql.Composable) -> sql.Composed:
        return SQL("ALTER PUBLICATION {} ").format(self._identifier) + SQL(action).format(*parts)


def _listed(options: list[str]) -> SQL:
    return SQL(", ".join(options))
