"""Following PostgreSQL's log by logical replication over plain SQL: the feed that puts slot, publication and messages together.

The driver speaks no replication protocol. Instead the slot is peeked at from the confirmed position on, as far as the
log reached when a read began, and advanced when that has been applied: what is not confirmed is given again.

What the log does not tell is seen by `attach` where it happened while this feed was open: a table that was written anew
(ALTER TABLE … USING), a partition that was attached, detached, dropped or truncated by itself, a table that was taken
out of the publication and put in again. Such a table joins again.
"""

from __future__ import annotations

import itertools
import pickle
import re
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import IO, Any, Final, NamedTuple, Self

import psycopg
from psycopg import errors

from embedd_dagster.errors import (
    ChangeFeedLost,
    EmbeddError,
    SourceRejected,
    SourceUnavailable,
)
from embedd_dagster.sources.changes import Attachment, ChangeBatch, FollowedTable
from embedd_dagster.sources.pgoutput import MalformedMessage
from embedd_dagster.sources.postgresql_change_batches import ChangeBatches, KeyLoaders
from embedd_dagster.sources.postgresql_connections import Connections
from embedd_dagster.sources.postgresql_errors import translate, translated
from embedd_dagster.sources.postgresql_followed import Followed, FollowedTables
from embedd_dagster.sources.postgresql_prerequisites import PREREQUISITES, Prerequisites, rejected
from embedd_dagster.sources.postgresql_publication import Published, Publisher
from embedd_dagster.sources.postgresql_slot import (
    Slot,
    advance_slot,
    create_slot,
    drop_slot,
    in_use,
    lsn_text,
    peek_slot,
    slot_lag_bytes,
    spare_server_log,
)

_NAME: Final = re.compile(r"[a-z0-9_]{1,50}")
# Messages decoded at once by the server, which keeps them in temporary files meanwhile; then on to the end of the
# transaction. Each time costs it a pass over its log from the slot's restart position on.
_PEEK_MESSAGES: Final = 200_000
_SPOOL_BYTES: Final = 4 * 2**20

# A session that makes slots and publications. Decoding a transaction of hours may take minutes, and a timeout would have
# it begin again for ever; a server that is gone shows by TCP keepalives.
FEED_SESSION: Final[Mapping[str, str]] = MappingProxyType(
    {
        "default_transaction_read_only": "off",
        "statement_timeout": "0",
        "idle_session_timeout": "0",
        "lock_timeout": "5s",  # behind an ALTER TABLE, or for transactions to end: it is tried again
    }
)

# The flushed position, not the written one: a slot is decoded as far as the log is flushed, and what is confirmed must
# have been decoded.
_STANDING: Final = """
SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery()
            THEN pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_flush_lsn(), '0/0')::pg_catalog.int8 END,
       (SELECT pg_catalog.to_jsonb(s) FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = %(name)s),
       EXISTS (SELECT FROM pg_catalog.pg_publication p WHERE p.pubname = %(name)s)
"""


class _Standing(NamedTuple):
    end: int | None
    """Of the log; None on a standby."""
    slot: Slot | None
    has_publication: bool


class PostgresChangeFeed:
    """One slot and one publication of one name, in the database of these connections."""

    def __init__(self, connections: Connections, name: str) -> None:
        """`connections`: of this feed alone, of sessions that may write and whose statements may last."""
        if not _NAME.fullmatch(name):
            raise ValueError("a feed's name is of a-z, 0-9 and _, and of 50 characters at most")
        self._connections = connections
        self._server = connections.server
        self._name = name
        self._closed = False
        self._connection: psycopg.Connection[Any] | None = None
        self._publisher = Publisher(name, connections.server)
        self._tables = FollowedTables(connections.server)
        self._stamps: dict[FollowedTable, object] = {}
        """What a table is published by and stored in, as of the last attach."""
        self._by_oid: dict[int, list[Followed]] | None = None
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

    def attach(self, tables: Sequence[FollowedTable], known_position: int | None) -> Attachment:
        """See the Protocol. Some six short queries where nothing has changed.

        A table that an open transaction has written to joins when that has ended: until then it is refused for now.
        """
        with self._session() as connection:
            standing = self._standing(connection)
            lost = self._fault(connection, standing, known_position)
            begins = standing.slot is None or lost is not None
            self._require_prerequisites(connection, standing, begins=begins)
            wanted, refused = self._tables.find_fit(connection, list(dict.fromkeys(tables)))
            published = self._publisher.publish(connection, wanted, into_slot=not begins)
            refused.update(published.refused)
            wanted = [one for one in wanted if one.table not in refused]
            if published.is_new and not begins:
                lost, begins = f"Publication {self._name!r} at {self._server} was dropped.", True
            if begins:
                position = self._begin(connection, standing.slot)
            else:
                position = standing.slot.confirmed if standing.slot and standing.slot.confirmed else 0
            joined = self._joined(wanted, published, everything=begins or known_position is None)
            by_oid: dict[int, list[Followed]] = {}
            for one in wanted:
                for oid in one.oids:
                    by_oid.setdefault(oid, []).append(one)
            self._by_oid, self._confirmed = by_oid, position
            return Attachment(position, joined, refused, lost if known_position is not None else None)

    def read(self, *, max_keys: int) -> Generator[ChangeBatch, None, None]:
        """See the Protocol. One round trip where nothing has been logged.

        No statement is open while a batch is worked on: what was decoded is kept in a temporary file. A position may come
        without any change, to let the log of other tables be forgotten too; it need not be confirmed at once.
        """
        if self._by_oid is None:
            raise RuntimeError("attach comes before read")
        with self._session() as connection:
            standing = self._standing(connection)
            self._require_followed(connection, standing)
            end = standing.end or 0
            given = self._confirmed = (standing.slot.confirmed if standing.slot else None) or 0
        if end <= max(given, self._quiet_to):
            yield ChangeBatch(position=max(given, end))
            return
        change_count = 0
        while True:
            # Where not all was confirmed, the next peek begins again with what was given: then to the end at once.
            limit = _PEEK_MESSAGES if self._confirmed >= given else None
            with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, prefix="embedd-") as spool:
                batch_count, batches, at_end = self._fill(spool, end, given, limit, max_keys)
                spool.seek(0)
                for _ in range(batch_count):
                    yield pickle.load(spool)  # noqa: S301 - an unnamed file that we wrote
            change_count += batches.change_count
            given = batches.position
            if at_end:
                break
        if not change_count:
            self._quiet_to = end

    def confirm(self, position: int) -> None:
        """Lets the server forget its log up to here. Idempotent. Raises ChangeFeedLost where there is no slot any more."""
        if position <= self._confirmed:
            return
        with self._session() as connection, self._slot_errors(connection):
            if not advance_slot(connection, self._name, position):
                raise ChangeFeedLost(f"{self._slot_label} was dropped.")
            self._confirmed = position

    def lag_bytes(self) -> int | None:
        """How much log the server keeps for the slot, from its restart position on; None where there is no slot.

        That lies before the confirmed position by what the transactions need that are open. On a connection of its own.
        """
        with translated(self._server), self._connections.borrow() as connection:
            return slot_lag_bytes(connection, self._name)

    def drop(self) -> None:
        """Slot and publication are gone; a publication that an administrator made stays. Idempotent."""
        with self._session() as connection:
            with self._slot_errors(connection):
                drop_slot(connection, self._name)
            self._publisher.drop(connection)
        self._by_oid = None
        self._confirmed = 0

    @property
    def _slot_label(self) -> str:
        return f"Replication slot {self._name!r} at {self._server}"

    def _standing(self, connection: psycopg.Connection[Any]) -> _Standing:
        row = connection.execute(_STANDING, {"name": self._name}).fetchone()
        end, slot, has_publication = row or (None, None, False)
        return _Standing(end, None if slot is None else Slot.parse(slot), has_publication)

    def _fault(self, connection: psycopg.Connection[Any], standing: _Standing, known: int | None) -> str | None:
        """Why the slot cannot be gone on from, as a sentence; None also where there never was one."""
        slot, what = standing.slot, self._slot_label
        if slot is None:
            return None if known is None else f"{what} is gone."
        if slot.active_pid not in (None, connection.info.backend_pid):
            raise in_use(self._name, self._server)
        if fault := slot.fault(self._server.database):
            return f"{what} {fault}."
        if not standing.has_publication:
            return f"Publication {self._name!r} at {self._server} was dropped."
        # Behind `known` the slot may well be: after a crash, the server remembers an earlier confirmation.
        if known is not None and slot.confirmed is not None and slot.confirmed > known:
            return f"{what} was moved on to {lsn_text(slot.confirmed)} by somebody else, or made anew."
        if known is not None and standing.end is not None and standing.end < known:
            return f"The log at {self._server} ends before {lsn_text(known)}: it is another server's, or restored."
        return None

    def _require_prerequisites(self, connection: psycopg.Connection[Any], standing: _Standing, *, begins: bool) -> None:
        row = connection.execute(PREREQUISITES).fetchone()
        prerequisites = Prerequisites(*(row or ()))
        problems = prerequisites.problems(
            self._server,
            for_publication=not standing.has_publication,
            for_slot=begins and standing.slot is None,
        )
        if problems:
            raise rejected(f"database {self._server.database!r}", problems)

    def _begin(self, connection: psycopg.Connection[Any], old: Slot | None) -> int:
        with self._slot_errors(connection):
            if old is not None:
                drop_slot(connection, self._name)
            position = create_slot(connection, self._name, self._server)
        self._quiet_to = 0
        return position

    def _joined(
        self, wanted: Sequence[Followed], published: Published, *, everything: bool
    ) -> frozenset[FollowedTable]:
        stamps: dict[FollowedTable, object] = {
            one.table: (one.relation.oid, published.stamps.get(one.table), one.state.files) for one in wanted
        }
        changed = {table for table, stamp in stamps.items() if self._stamps.get(table, stamp) != stamp}
        self._stamps = stamps
        return frozenset(stamps) if everything else frozenset(changed | (published.joined & stamps.keys()))

    def _require_followed(self, connection: psycopg.Connection[Any], standing: _Standing) -> None:
        if standing.end is None:
            self._require_prerequisites(connection, standing, begins=False)
        if standing.slot is None:
            raise ChangeFeedLost(f"{self._slot_label} was dropped.")
        if fault := standing.slot.fault(self._server.database):
            raise ChangeFeedLost(f"{self._slot_label} {fault}.")
        if not standing.has_publication:
            raise ChangeFeedLost(f"Publication {self._name!r} at {self._server} was dropped.")

    def _fill(
        self, spool: IO[bytes], end: int, given: int, limit: int | None, max_keys: int
    ) -> tuple[int, ChangeBatches, bool]:
        """Puts the batches of one peek into the file: how many, what they were made by, and whether that was all."""
        with self._session() as connection, self._slot_errors(connection):
            loaders = KeyLoaders(connection, may_hold_invalid_text=self._connections.may_hold_invalid_text)
            by_oid = self._by_oid or {}
            for one in itertools.chain.from_iterable(by_oid.values()):
                loaders.add(one.state.type_oids[one.key.name], one.key)
            batches = ChangeBatches(by_oid, loaders, max_keys=max_keys, given=given)
            batch_count = 0
            for batch in batches.of(peek_slot(connection, self._name, upto=end, limit=limit)):
                pickle.dump(batch, spool, pickle.HIGHEST_PROTOCOL)
                batch_count += 1
        at_end = limit is None or batches.message_count < limit
        last = batches.last(max(end, batches.position) if at_end else None)
        if last is not None:
            pickle.dump(last, spool, pickle.HIGHEST_PROTOCOL)
            batch_count += 1
        return batch_count, batches, at_end

    @contextmanager
    def _session(self) -> Iterator[psycopg.Connection[Any]]:
        """The feed's own connection, kept between calls; closed when the block raises what is not ours."""
        if self._closed:
            raise SourceUnavailable(f"The feed {self._name!r} of {self._server} has been closed.")
        if self._connection is None:
            self._connection = self._connections.open()
            with translated(self._server):
                spare_server_log(self._connection)
        try:
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
            standing = self._standing(connection)
            self._require_prerequisites(connection, standing, begins=False)
            self._require_followed(connection, standing)
            if isinstance(error, errors.UndefinedObject):
                # Up to version 17: the publication was not there at this point of the log, and nothing leads past it.
                drop_slot(connection, self._name)
                raise ChangeFeedLost(
                    f"Publication {self._name!r} at {self._server} was dropped, and made again."
                ) from None
            raise
