"""Following PostgreSQL's log by logical replication over plain SQL: the feed that puts slot, publication and messages together.

The driver speaks no replication protocol. Instead the slot is peeked at from the confirmed position on, as far as the
log reached when a read began, and advanced when that has been applied: what is not confirmed is given again.

What the log does not tell is seen by `subscribe` in the tables' shapes (`postgresql_shapes`): such a table joins again.
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

# Of transactions that make slots and publications. Decoding a transaction of hours may take minutes, and a timeout would have
# it begin again for ever; a server that is gone shows by TCP keepalives.
STREAM_SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "statement_timeout": "0",
        "lock_timeout": "2s",  # behind a VACUUM or an ALTER TABLE: it is tried again
        "synchronous_commit": "local",  # a standby that is away must not hold up what is done to the publication
    }
)


class PostgresCdcStream:
    """One slot and one publication of one name, in the database of these connections."""

    def __init__(self, connections: SourceConnections, name: str, options: StreamOptions) -> None:
        """`connections`: of this feed alone, of sessions that may write and whose statements may last."""
        if not _NAME.fullmatch(name):
            raise ValueError("a feed's name is of a-z, 0-9 and _, and of 50 characters at most")
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
        """Up to where there was found nothing beyond the confirmed position."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives connections back; the server goes on keeping its log. Idempotent."""
        self._closed = True
        self._disconnect()
        self._connections.close()

    def subscribe(
        self,
        tables: Sequence[CdcTable],
        known_position: str | None,
        known_fingerprints: Mapping[CdcTable, TableFingerprint | None],
    ) -> Subscription:
        """See the Protocol. Some six short queries where nothing has changed.

        A table that an open transaction has written to joins when that has ended: until then it is rejected for now.
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
                # Before anything is mended: should we die in between, the next one begins anew as well.
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
        """See the Protocol. If nothing has been logged it is two statements in one transaction.

        No statement is open while a batch is worked on: what was decoded is kept in a temporary file. A position may come
        without any change, to let the log of other tables be forgotten too; it need not be confirmed at once.
        """
        if self._by_oid is None:
            raise RuntimeError("subscribe comes before read")
        with self._session() as connection, connection.scope():
            status = read_slot_status(connection, self._name)
            self._require_readable(connection, status)
            end = status.end or 0
            begins_at = (status.slot.confirmed if status.slot else None) or 0
            if begins_at > self._confirmed:
                # nobody but us confirms: what lies between would never be read
                raise CdcPositionLost(f"{slot_label(self._name, self._server)} was moved on by somebody else.")
            given = self._confirmed = begins_at
            self._alterations.look(connection)
        if end <= max(given, self._quiet_to):
            yield ChangeBatch(position=lsn_text(max(given, end)))
            return
        change_count = unconfirmed = 0
        while True:
            # A peek begins at what is confirmed by now: what was given beyond that comes again, and is passed over.
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
        """Lets the server forget its log up to here. Idempotent. Raises CdcPositionLost where there is no slot any more."""
        lsn = parse_lsn(position)
        if lsn <= self._confirmed:
            return
        with self._session() as connection, self._slot_errors(connection):
            if not advance_slot(connection, self._name, lsn):
                raise CdcPositionLost(f"{slot_label(self._name, self._server)} is gone.")
            self._confirmed = lsn

    @property
    def is_altered(self) -> bool:
        """Whether the last `read` has found that a followed table was altered."""
        return self._alterations.found

    def lag(self) -> Lag | None:
        """How much log the server keeps for the slot, from its restart position on; None where there is no slot.

        That lies before the confirmed position by what the transactions need that are open. On a connection of its own.
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
        """Slot and publication are gone; a publication that an administrator made stays. Idempotent."""
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
        """Puts the batches of one peek into the file.

        Gives what made them; of each its position, and how many messages led up to it; and whether that was all.
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
        """The feed's own connection, kept between calls; closed when the block raises what is not ours."""
        if self._closed:
            raise SourceUnavailable(f"The feed {self._name!r} of {self._server} has been closed.")
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
                f"PostgreSQL at {self._server} sent what is no message of pgoutput: {error}."
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
        """What a function of slots says is wrong, told by looking: versions differ in their states, and their texts."""
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
