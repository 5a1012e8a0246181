"""Whether other sessions see a transaction that the log has given.

Logical decoding gives a transaction as soon as its commit is flushed. Other sessions see its rows only when the commit
returns. If commits wait for a standby (`synchronous_standby_names`), that may be seconds or hours later, and rows that are
read in between are older than the transaction.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.errors import SourceUnavailable

_FIRST_POLL_SECONDS: Final = 0.005
_LONGEST_POLL_SECONDS: Final = 0.1
_HALF: Final = 1 << 31
_SNAPSHOT: Final = "SELECT pg_catalog.pg_current_snapshot()::pg_catalog.text"
_IS_SYNCHRONOUS: Final = "SELECT pg_catalog.current_setting('synchronous_standby_names')"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`pg_current_snapshot()`: which transactions had ended when it was taken."""

    xmax: int
    """The first 64-bit transaction number after all that had ended."""
    in_progress: frozenset[int]
    """Those before it that had not ended."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of PostgreSQL's own text, such as `10:20:10,14`."""
        _xmin, xmax, running = text.split(":")
        return cls(int(xmax), frozenset(map(int, filter(None, running.split(",")))))

    def unfinished(self, xids: Iterable[int]) -> set[int]:
        """Those of these 32-bit transaction numbers that had not ended."""
        return {xid for xid in xids if (full := self._full(xid)) >= self.xmax or full in self.in_progress}

    def _full(self, xid: int) -> int:
        """The 64-bit number: a server never has two transactions in use that are more than 2^31 apart."""
        return self.xmax + (xid - self.xmax + _HALF) % (2 * _HALF) - _HALF


class Visibility:
    """Waits until transactions are visible to every statement that begins afterwards."""

    def __init__(self, server: Server, wait_seconds: float) -> None:
        self._server = server
        self._wait_seconds = wait_seconds
        self._snapshot: Snapshot | None = None

    def await_ended(self, connection: psycopg.Connection[Any], xids: Iterable[int]) -> None:
        """Returns when these transactions have ended. Raises SourceUnavailable if that takes too long."""
        waiting = set(xids)
        if self._snapshot is not None:  # what had ended then has ended
            waiting = self._snapshot.unfinished(waiting)
        deadline = time.monotonic() + self._wait_seconds
        poll = 0.0
        while waiting:
            time.sleep(poll)
            poll = min(max(2 * poll, _FIRST_POLL_SECONDS), _LONGEST_POLL_SECONDS)
            self._snapshot = read_snapshot(connection)
            waiting = self._snapshot.unfinished(waiting)
            if waiting and time.monotonic() > deadline:
                raise self._still_waiting(len(waiting))

    def _still_waiting(self, count: int) -> SourceUnavailable:
        what = "1 transaction is" if count == 1 else f"{count} transactions are"
        return SourceUnavailable(
            f"{what} in the log of {self._server}, but other sessions cannot see the rows yet: the commit waits for a"
            " synchronous standby. Changes of this connection are applied when it has returned.",
            resolution="Bring the standby back, or take it out of synchronous_standby_names. SELECT application_name, state,"
            " sync_state FROM pg_stat_replication; shows which standbys the server has.",
        )


def read_snapshot(connection: psycopg.Connection[Any]) -> Snapshot:
    """Which transactions have ended."""
    row = connection.execute(_SNAPSHOT).fetchone()
    return Snapshot.parse(row[0] if row else "0:0:")


def commits_wait_for_a_standby(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server is set so that commits may wait for a standby."""
    row = connection.execute(_IS_SYNCHRONOUS).fetchone()
    return bool(row and row[0].strip())
