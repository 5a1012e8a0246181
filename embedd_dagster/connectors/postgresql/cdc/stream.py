"""The CDC stream of PostgreSQL: logical replication over plain SQL, from a slot, a publication and pgoutput's messages.

The driver has no replication protocol. Instead, a read peeks at the slot, from the confirmed position to the end that the log
had when the read began. `confirm` advances the slot: what is not confirmed is given again.

`subscribe` notices what the log does not report by the tables' fingerprints (`table_fingerprint`): such a table is newly
subscribed.
"""

from __future__ import annotations

import itertools
import pickle
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import IO, Any, Final, Self

import psycopg
from psycopg import errors

from embedd_dagster.connectors.postgresql.cdc.alterations import Alterations
from embedd_dagster.connectors.postgresql.cdc.batches import ChangeBatches, KeyLoaders
from embedd_dagster.connectors.postgresql.cdc.cleanup_advice import removal_statement
from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.cdc.pgoutput import MalformedMessage
from embedd_dagster.connectors.postgresql.cdc.poolers import require_own_session
from embedd_dagster.connectors.postgresql.cdc.prerequisites import PREREQUISITES, Prerequisites, rejection
from embedd_dagster.connectors.postgresql.cdc.publisher import Publisher, PublishResult
from embedd_dagster.connectors.postgresql.cdc.slot import (
    SlotStatus,
    advance_slot,
    create_slot,
    drop_slot,
    in_use,
    lsn_text,
    parse_lsn,
    peek_slot,
    prepare_session,
    read_slot_status,
    slot_label,
    slot_lag_bytes,
)
from embedd_dagster.connectors.postgresql.cdc.table_fingerprint import (
    fingerprint_of,
    is_altered,
    publication_fingerprint_of,
)
from embedd_dagster.connectors.postgresql.cdc.tables import CdcTables, ResolvedTable
from embedd_dagster.connectors.postgresql.cdc.visibility import Visibility
from embedd_dagster.connectors.postgresql.credentials import DEFAULT_PORT
from embedd_dagster.connectors.postgresql.errors import translate, translated
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection
from embedd_dagster.connectors.postgresql.source_connections import SourceConnections
from embedd_dagster.connectors.postgresql.text_dependencies import read_text_dependencies
from embedd_dagster.errors import (
    CdcPositionLost,
    EmbeddError,
    SourceRejected,
    SourceUnavailable,
)
from embedd_dagster.protocols.cdc import CdcTable, ChangeBatch, Lag, Subscription, TableFingerprint

_NAME: Final = re.compile(r"[a-z0-9_]{1,50}")
_SPOOL_BYTES: Final = 4 * 2**20

# Of transactions that create slots and publications. Decoding a transaction of hours may take minutes, and a timeout would
# make it start again for ever. TCP keepalives notice a server that is gone.
STREAM_SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "statement_timeout": "0",
        "lock_timeout": "2s",  # behind a VACUUM or an ALTER TABLE: it is tried again
        "synchronous_commit": "local",  # a standby that is away must not delay changes of the publication
    }
)


class PostgresCdcStream:
    """One slot and one publication of the same name."""

    def __init__(self, connections: SourceConnections, name: str, options: StreamOptions) -> None:
        """`connections`: used by this stream alone; their sessions may write, and their statements have no timeout."""
        if not _NAME.fullmatch(name):
            raise ValueError("a stream's name has only a-z, 0-9 and _, and at most 50 characters")
        self._connections = connections
        self._server = connections.server
        self._name = name
        self._closed = False
        self._connection: ScopedConnection | None = None
        self._options = options
        self._publisher = Publisher(name, connections.server, options)
        self._tables = CdcTables(connections.server)
        self._visibility = Visibility(connections.server, options.visible_seconds)
        self._by_oid: dict[int, list[ResolvedTable]] | None = None
        self._alterations = Alterations(())
        self._confirmed = 0
        self._quiet_to = 0
        """Up to here, nothing was found after the confirmed position."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes connections; the server continues to keep its log. Idempotent."""
        self._closed = True
        self._disconnect()
        self._connections.close()

    def subscribe(
        self,
        tables: Sequence[CdcTable],
        known_position: str | None,
        known_fingerprints: Mapping[CdcTable, TableFingerprint | None],
    ) -> Subscription:
        """See the protocol. About six short queries if nothing has changed.

        A table that an open transaction has written to is rejected until that transaction ends.
        """
        with self._session() as connection:
            status = read_slot_status(connection, self._name)
            if status.slot is not None and status.slot.active_pid not in (None, connection.server_pid):
                raise in_use(self._name, self._server)
            known = None if known_position is None else parse_lsn(known_position)
            lost = status.fault(self._server, known)
            begins = status.slot is None or lost is not None
            self._require_prerequisites(connection, status, begins=begins)
            if begins and status.slot is not None:
                # Before anything is repaired: if this run dies in between, the next one starts again as well.
                self._drop_slot(connection)
            wanted, rejected = self._tables.find_eligible(connection, list(dict.fromkeys(tables)))
            known_publications = {
                table: publication_fingerprint_of(known) for table, known in known_fingerprints.items()
            }
            published = self._publisher.publish(connection, wanted, known_publications, into_slot=not begins)
            rejected.update(published.rejected)
            wanted = [one for one in wanted if one.table not in rejected]
            if published.is_new and not begins:
                self._drop_slot(connection)
                lost, begins = f"Publication {self._name!r} at {self._server} was dropped.", True
            if begins:
                position, self._quiet_to = (
                    create_slot(connection, self._name, self._server, self._options.create_seconds),
                    0,
                )
                self._publisher.await_commits(connection, wanted, published)
                rejected.update(published.rejected)
                wanted = [one for one in wanted if one.table not in rejected]
            else:
                position = (status.slot.confirmed if status.slot else None) or 0
            fingerprints = self._fingerprints(connection, wanted, published, known_fingerprints)
            if begins or known is None:
                newly_subscribed = frozenset(fingerprints)
            else:
                altered = {
                    table for table, now in fingerprints.items() if is_altered(known_fingerprints.get(table), now)
                }
                newly_subscribed = frozenset(altered | (published.newly_subscribed & fingerprints.keys()))
            by_oid: dict[int, list[ResolvedTable]] = {}
            for one in wanted:
                for oid in one.oids:
                    by_oid.setdefault(oid, []).append(one)
            self._by_oid, self._confirmed = by_oid, position
            self._alterations = Alterations(by_oid)
            return Subscription(
                lsn_text(position),
                newly_subscribed,
                fingerprints,
                rejected,
                hidden=frozenset(table for table in rejected if self._tables.hides_rows(table)),
                lost=None if known is None else lost,
            )

    @staticmethod
    def _fingerprints(
        connection: psycopg.Connection[Any],
        tables: Sequence[ResolvedTable],
        published: PublishResult,
        known: Mapping[CdcTable, TableFingerprint | None],
    ) -> dict[CdcTable, TableFingerprint]:
        dependencies = read_text_dependencies(connection, [one.details for one in tables])
        return {
            one.table: fingerprint_of(
                one, published.fingerprints[one.table], dependencies[one.relation.oid], known.get(one.table)
            )
            for one in tables
        }

    def read(self, *, max_keys: int) -> Generator[ChangeBatch, None, None]:
        """See the protocol. If nothing has been logged it is two statements in one transaction.

        No statement is open while a batch is applied: what was decoded is kept in a temporary file. A position may come without
        a change, so that the log of other tables can be discarded too; it need not be confirmed at once.
        """
        if self._by_oid is None:
            raise RuntimeError("subscribe comes before read")
        with self._session() as connection, connection.scope():
            status = read_slot_status(connection, self._name)
            self._require_readable(connection, status)
            end = status.end or 0
            begins_at = (status.slot.confirmed if status.slot else None) or 0
            if begins_at > self._confirmed:
                # only this stream confirms: what lies between would never be read
                raise CdcPositionLost(f"{slot_label(self._name, self._server)} was moved on by somebody else.")
            given = self._confirmed = begins_at
            self._alterations.look(connection)
        if end <= max(given, self._quiet_to):
            yield ChangeBatch(position=lsn_text(max(given, end)))
            return
        change_count = unconfirmed = 0
        while True:
            # A peek begins at the confirmed position: what was given after that comes again, and is skipped.
            limit = max(self._options.peek_messages + unconfirmed, 2 * unconfirmed)
            with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, prefix="embedd-") as spool:
                batches, marks, at_end = self._fill(spool, end, given, limit, max_keys)
                spool.seek(0)
                for _ in marks:
                    batch: ChangeBatch = pickle.load(spool)  # noqa: S301 - an unnamed file that we wrote
                    if batch.transactions:
                        with self._session() as connection:
                            self._visibility.await_ended(connection, batch.transactions)
                    yield batch
            change_count += batches.change_count
            if at_end:
                break
            given = batches.position
            confirmed = [count for position, count in marks if position and parse_lsn(position) <= self._confirmed]
            unconfirmed = batches.message_count - max(confirmed, default=0)
        if not change_count:
            self._quiet_to = end

    def confirm(self, position: str) -> None:
        """Lets the server discard its log up to here. Idempotent. Raises CdcPositionLost if the slot is gone."""
        lsn = parse_lsn(position)
        if lsn <= self._confirmed:
            return
        with self._session() as connection, self._slot_errors(connection):
            if not advance_slot(connection, self._name, lsn):
                raise CdcPositionLost(f"{slot_label(self._name, self._server)} is gone.")
            self._confirmed = lsn

    @property
    def is_altered(self) -> bool:
        """Whether the last `read` found that a subscribed table was altered."""
        return self._alterations.found

    def lag(self) -> Lag | None:
        """How much log the server keeps for the slot, from its restart position on; None if there is no slot.

        That lies before the confirmed position, by what open transactions need. On its own connection.
        """
        with translated(self._server), self._connections.borrow() as connection:
            lag_bytes = slot_lag_bytes(connection, self._name)
        return None if lag_bytes is None else Lag(lag_bytes, "bytes")

    def reads_log_of(self, credentials: Mapping[str, Any]) -> bool:
        """Whether these credentials lead to the same host, port and database."""
        server, port = self._server, credentials.get("port", DEFAULT_PORT)
        return (credentials.get("host"), port, credentials.get("database")) == (
            server.host,
            server.port,
            server.database,
        )

    @property
    def removal_advice(self) -> str:
        """How an administrator removes the slot, if `drop` cannot."""
        return f"Run {removal_statement(self._name)} in database {self._server.database!r} at {self._server}."

    def drop(self) -> None:
        """Drops slot and publication; a publication that an administrator made stays. Idempotent."""
        with self._session() as connection:
            self._drop_slot(connection)
            self._publisher.drop(connection)
        self._by_oid = None
        self._confirmed = 0

    def _require_prerequisites(self, connection: psycopg.Connection[Any], status: SlotStatus, *, begins: bool) -> None:
        row = connection.execute(PREREQUISITES).fetchone()
        prerequisites = Prerequisites(*(row or ()))
        problems = prerequisites.problems(
            self._server,
            for_publication=not status.has_publication,
            for_slot=begins and status.slot is None,
        )
        if problems:
            raise rejection(f"database {self._server.database!r}", problems)

    def _drop_slot(self, connection: psycopg.Connection[Any]) -> None:
        with self._slot_errors(connection):
            drop_slot(connection, self._name)

    def _require_readable(self, connection: psycopg.Connection[Any], status: SlotStatus) -> None:
        if status.end is None:
            self._require_prerequisites(connection, status, begins=False)
        label = slot_label(self._name, self._server)
        fault = status.fault(self._server, None) if status.slot else f"{label} is gone."
        if fault:
            raise CdcPositionLost(fault)

    def _fill(
        self, spool: IO[bytes], end: int, given: int, limit: int, max_keys: int
    ) -> tuple[ChangeBatches, list[tuple[str | None, int]], bool]:
        """Writes the batches of one peek into the file.

        Returns what made them, the position of each with the number of messages up to it, and whether that was all.
        """
        marks: list[tuple[str | None, int]] = []

        def put(batch: ChangeBatch) -> None:
            pickle.dump(batch, spool, pickle.HIGHEST_PROTOCOL)
            marks.append((batch.position, batches.message_count))

        # in one scope: how the driver loads dates depends on the transaction's settings
        with self._session() as connection, self._slot_errors(connection), connection.scope():
            loaders = KeyLoaders(connection, may_hold_invalid_text=self._connections.may_hold_invalid_text)
            by_oid = self._by_oid or {}
            for one in itertools.chain.from_iterable(by_oid.values()):
                loaders.add(one.details.columns[one.key.name][1], one.key)
            batches = ChangeBatches(by_oid, loaders, max_keys=max_keys, given=given)
            for batch in batches.of(peek_slot(connection, self._name, upto=end, limit=limit)):
                put(batch)
        at_end = batches.message_count < limit or batches.position >= end
        last = batches.last(max(end, batches.position) if at_end else None)
        if last is not None:
            put(last)
        return batches, marks, at_end

    @contextmanager
    def _session(self) -> Iterator[ScopedConnection]:
        """The stream's own connection, kept between calls; closed if the block raises an error that is not ours."""
        if self._closed:
            raise SourceUnavailable(f"The CDC stream {self._name!r} of {self._server} has been closed.")
        try:
            if self._connection is None:
                connection = self._connections.open()
                if not connection.is_direct:
                    connection.close()
                    require_own_session(self._connections)
                    connection = self._connections.open()
                self._connection = connection
                prepare_session(connection)
            yield self._connection
        except EmbeddError:
            if self._connection is not None and self._connection.closed:
                self._disconnect()
            raise
        except (psycopg.Error, psycopg.Warning, UnicodeError) as error:
            self._disconnect()
            raise translate(error, self._server) from None
        except MalformedMessage as error:
            self._disconnect()
            raise SourceRejected(
                f"PostgreSQL at {self._server} sent what is not a message of pgoutput: {error}."
            ) from None
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextmanager
    def _slot_errors(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        """Finds out what is wrong with the slot by reading its status: SQLSTATEs and texts differ between versions."""
        try:
            yield
        except errors.ObjectInUse:
            raise in_use(self._name, self._server) from None
        except (errors.UndefinedObject, errors.ObjectNotInPrerequisiteState, errors.InsufficientPrivilege) as error:
            if connection.closed:
                raise
            status = read_slot_status(connection, self._name)
            self._require_prerequisites(connection, status, begins=False)
            self._require_readable(connection, status)
            if isinstance(error, errors.UndefinedObject):
                # Up to version 17: the publication was not there at this point of the log, and nothing leads past it.
                drop_slot(connection, self._name)
                raise CdcPositionLost(
                    f"Publication {self._name!r} at {self._server} was dropped, and made again."
                ) from None
            raise
