"""The replication slot for which PostgreSQL keeps its log: its status, and every operation on it, over plain SQL.

Nothing here knows of tables. SQL's functions occupy the slot only while they run, so it is `active` only that long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg
from psycopg import errors
from psycopg.sql import SQL

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection
from embedd_dagster.errors import SourceUnavailable

PLUGIN: Final = "pgoutput"
# Rows taken in by the driver at once, before the next are asked for: of rows of 1 MB, 64 MB.
_CHUNK_ROWS: Final = 64 if psycopg.capabilities.has_stream_chunked() else 1


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of `pg_replication_slots`, of any server version."""

    plugin: str | None
    database: str | None
    active_pid: int | None
    confirmed: int | None
    invalid_because: str | None
    """A word of PostgreSQL for why the log before it is not kept any more; None while it is."""
    is_two_phase: bool
    """Whether it gives transactions when they are prepared, which may never be committed. Ours is not made so."""

    @classmethod
    def parse(cls, row: dict[str, Any]) -> Self:
        """Of the row as JSON, as its columns differ: `conflicting` is of version 16, `invalidation_reason` of 17."""
        reason = row.get("invalidation_reason")
        if reason is None and row.get("wal_status") == "lost":
            reason = "wal_removed"
        if reason is None and row.get("conflicting"):
            reason = "conflicting"
        confirmed = row.get("confirmed_flush_lsn")
        return cls(
            plugin=row.get("plugin"),
            database=row.get("database"),
            active_pid=row.get("active_pid"),
            confirmed=None if confirmed is None else parse_lsn(confirmed),
            invalid_because=reason,
            is_two_phase=bool(row.get("two_phase")),
        )

    def fault(self, database: str) -> str | None:
        """Why nothing can be read from it, at any position; None if it can be read."""
        if self.plugin != PLUGIN:
            return f"is of another kind ({self.plugin or 'physical'})"
        if self.database != database:
            return f"is of another database ({self.database!r})"
        if self.invalid_because is not None:
            return f"was invalidated by the server ({self.invalid_because})"
        if self.is_two_phase:
            return "gives transactions before they are committed (two_phase)"
        if self.confirmed is None:
            return "has no position"
        return None


def parse_lsn(text: str) -> int:
    """A position in the log as a number of bytes, from PostgreSQL's text for it."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(position: int) -> str:
    """PostgreSQL's own text for a position."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """What a stream finds in its database."""

    name: str
    end: int | None
    """Of the server's log; None on a standby."""
    slot: Slot | None
    has_publication: bool

    def fault(self, server: Server, known: int | None) -> str | None:
        """Why a stream cannot continue from the known position, as a sentence. None also if there never was a slot."""
        slot, what = self.slot, slot_label(self.name, server)
        if slot is None:
            return None if known is None else f"{what} is gone."
        if fault := slot.fault(server.database):
            return f"{what} {fault}."
        if not self.has_publication:
            return f"Publication {self.name!r} at {server} was dropped."
        # Behind `known` the slot may well be: after a crash, the server remembers an earlier confirmation.
        if known is not None and slot.confirmed is not None and slot.confirmed > known:
            return f"{what} was moved on to {lsn_text(slot.confirmed)} by somebody else, or created again."
        if known is not None and self.end is not None and self.end < known:
            return f"The log at {server} ends before {lsn_text(known)}: it is another server's, or restored."
        return None


def slot_label(name: str, server: Server) -> str:
    """The slot of this name in a message."""
    return f"Replication slot {name!r} at {server}"


# The flushed position, not the written one: a slot is decoded as far as the log is flushed, and what is confirmed must
# have been decoded.
_STATUS: Final = """
SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery()
            THEN pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_flush_lsn(), '0/0')::pg_catalog.int8 END,
       (SELECT pg_catalog.to_jsonb(s) FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = %(name)s),
       EXISTS (SELECT FROM pg_catalog.pg_publication p WHERE p.pubname = %(name)s)
"""


def read_slot_status(connection: psycopg.Connection[Any], name: str) -> SlotStatus:
    """The status of the slot of this name, in one round trip."""
    row = connection.execute(_STATUS, {"name": name}).fetchone()
    end, slot, has_publication = row or (None, None, False)
    return SlotStatus(name, end, None if slot is None else Slot.parse(slot), has_publication)


_CREATE: Final = "SELECT lsn::pg_catalog.text FROM pg_catalog.pg_create_logical_replication_slot(%s, %s)"
_DROP: Final = (
    "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = %s"
)
_PEEK: Final = """
SELECT data FROM pg_catalog.pg_logical_slot_peek_binary_changes(
    %s, %s::pg_catalog.pg_lsn, %s::pg_catalog.int4, 'proto_version', '1', 'publication_names', %s)
"""
# Going back would be an error of the server; here it does nothing. The CASE is computed for the one row only.
_ADVANCE: Final = """
SELECT CASE WHEN s.confirmed_flush_lsn < %(to)s::pg_catalog.pg_lsn
            THEN (pg_catalog.pg_replication_slot_advance(s.slot_name, %(to)s::pg_catalog.pg_lsn)).end_lsn END
FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = %(name)s
"""
# From the restart position on: what decoding will have to read again, and what files are kept for. The distance to the
# confirmed position would be small while one long transaction of somebody keeps the whole log.
_LAG: Final = """
SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), restart_lsn)::pg_catalog.int8
FROM pg_catalog.pg_replication_slots WHERE slot_name = %s
"""


def prepare_session(connection: ScopedConnection) -> None:
    """Keeps decoding out of the server's log, and the session from being ended while it is idle.

    Up to version 18 at least, each start of decoding is two entries in the server's log, of level LOG, and a busy server is
    read some times per second. Superusers may change that level; from version 15 on, others may after
    `GRANT SET ON PARAMETER log_min_messages TO …`.
    """
    if connection.info.server_version >= 150000:
        allowed = "pg_catalog.has_parameter_privilege('log_min_messages', 'SET')"
    else:
        allowed = "(SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = CURRENT_USER)"
    row = connection.execute(SQL("SELECT ") + SQL(allowed)).fetchone()
    if row and row[0]:
        connection.settings = {**connection.settings, "log_min_messages": "fatal"}
    if connection.is_direct:  # a setting of the session, which nobody else uses
        connection.execute_outside("SET idle_session_timeout = 0")


def create_slot(connection: psycopg.Connection[Any], name: str, server: Server, wait_seconds: float) -> int:
    """Creates the slot; returns the position after which it gives everything that is committed.

    The server waits for transactions that have written already, so that none is seen by half. It gives up after a while,
    and has made nothing then.
    """
    try:
        with connection.transaction():
            connection.execute(
                "SELECT pg_catalog.set_config('lock_timeout', %s, true)", [f"{round(wait_seconds * 1000)}ms"]
            )
            row = connection.execute(_CREATE, [name, PLUGIN]).fetchone()
    except errors.LockNotAvailable:
        raise SourceUnavailable(
            f"Following database {server.database!r} at {server} begins when the transactions that are open there have"
            " ended; one has been open for long.",
            resolution="Nothing to do: it is tried again. SELECT pid, xact_start, query FROM pg_stat_activity shows it.",
        ) from None
    if row is None:
        raise SourceUnavailable(f"PostgreSQL at {server} did not say where its log begins.")
    return parse_lsn(row[0])


def drop_slot(connection: psycopg.Connection[Any], name: str) -> None:
    """Drops the slot, if there is one."""
    connection.execute(_DROP, [name])


def advance_slot(connection: psycopg.Connection[Any], name: str, position: int) -> bool:
    """Lets the server discard its log up to this position. False if there is no slot of this name."""
    return connection.execute(_ADVANCE, {"name": name, "to": lsn_text(position)}).fetchone() is not None


def peek_slot(connection: psycopg.Connection[Any], name: str, *, upto: int, limit: int | None) -> Iterator[bytes]:
    """The messages since the confirmed position: of all transactions committed before `upto`, which must be flushed.

    With a limit, it ends with the transaction in which so many messages are reached. The server decodes all of it into
    its own temporary files before it sends the first; here, only a few are held at a time.
    """
    with connection.cursor() as cursor:
        rows = cursor.stream(_PEEK, [name, lsn_text(upto), limit, name], binary=True, size=_CHUNK_ROWS)
        for row in rows:
            yield row[0]


def slot_lag_bytes(connection: psycopg.Connection[Any], name: str) -> int | None:
    """How much log is kept for the slot; None if there is no slot, or no log is kept for it."""
    row = connection.execute(_LAG, [name]).fetchone()
    return row[0] if row else None


def in_use(name: str, server: Server) -> SourceUnavailable:
    """Another session uses the slot."""
    return SourceUnavailable(
        f"{slot_label(name, server)} is in use by another session.",
        resolution="Nothing to do if it passes: a session of ours that was cut off may still be ending. Else end what"
        " reads it: SELECT slot_name, active_pid FROM pg_replication_slots;",
    )
