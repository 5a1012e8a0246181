"""Frequent reads of one row: one prepared statement, one round trip, no ORM.

Everything else uses `Catalog.transaction`. For a single read, SQLAlchemy's session, its transaction and the check of its
connection would cost four round trips and ten times the CPU.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg

from embedd_dagster.errors import CatalogUnavailable

_TIMEOUT_SECONDS: Final = 10.0

Cursor = psycopg.Cursor[tuple[Any, ...]]


class Lookups:
    """A few connections in autocommit, opened when needed. Safe to use from several threads."""

    def __init__(self, connect: Callable[[], psycopg.Connection[tuple[Any, ...]]], *, size: int) -> None:
        """`connect` opens a connection in autocommit; at most `size` are open at once."""
        self._connect = connect
        self._closed = False
        # last in, first out: connections that only a burst needed stay idle
        self._slots: queue.LifoQueue[Cursor | None] = queue.LifoQueue()
        for _ in range(size):
            self._slots.put(None)

    def fetch_one(self, statement: str, parameters: Sequence[object]) -> tuple[Any, ...] | None:
        """The first row, or None. Raises CatalogUnavailable.

        If a connection was lost while it was idle, the read is repeated once on a new one.
        """
        try:
            cursor = self._slots.get(timeout=_TIMEOUT_SECONDS)
        except queue.Empty:
            raise CatalogUnavailable("Every connection to the catalog database is in use.") from None
        try:
            if cursor is not None:
                try:
                    return cursor.execute(statement, parameters, prepare=True).fetchone()
                except psycopg.Error:
                    if not cursor.connection.closed:
                        raise
            cursor = self._connect().cursor()
            return cursor.execute(statement, parameters, prepare=True).fetchone()
        except psycopg.OperationalError as error:
            raise CatalogUnavailable("The catalog database does not answer.") from error
        finally:
            self._give_back(cursor)

    def _give_back(self, cursor: Cursor | None) -> None:
        if cursor is not None and (self._closed or cursor.connection.closed):
            cursor.connection.close()
            cursor = None
        self._slots.put(cursor)

    def close(self) -> None:
        """Closes idle connections now, and those in use when they are given back. Idempotent."""
        self._closed = True
        for _ in range(self._slots.qsize()):
            try:
                cursor = self._slots.get_nowait()
            except queue.Empty:
                return
            self._give_back(cursor)
