"""Single reads that are made very often: one prepared statement, one round trip, and nothing of the ORM.

A unit of work belongs into `Catalog.transaction`. A query of a vector table is no unit of work: it asks one question, and
SQLAlchemy's session, its transaction and the check of its connection cost it four round trips and ten times the CPU.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg

from embedd_dagster.errors import CatalogUnavailable

_PATIENCE_SECONDS: Final = 10.0

Cursor = psycopg.Cursor[tuple[Any, ...]]


class Lookups:
    """A few connections in autocommit, opened when they are needed. Safe to use from several threads."""

    def __init__(self, connect: Callable[[], psycopg.Connection[tuple[Any, ...]]], *, size: int) -> None:
        """`connect` opens a connection in autocommit; no more than `size` of them are open."""
        self._connect = connect
        self._closed = False
        # the one used last is taken first: those that a burst has opened stay idle
        self._slots: queue.LifoQueue[Cursor | None] = queue.LifoQueue()
        for _ in range(size):
            self._slots.put(None)

    def fetch_one(self, statement: str, parameters: Sequence[object]) -> tuple[Any, ...] | None:
        """The first row of a read, or None. Raises CatalogUnavailable.

        A connection that was lost while it was idle is replaced, and the read is made again: it changes nothing.
        """
        try:
            cursor = self._slots.get(timeout=_PATIENCE_SECONDS)
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
        """Idle connections are closed now, borrowed ones when they come back. Idempotent."""
        self._closed = True
        for _ in range(self._slots.qsize()):
            try:
                cursor = self._slots.get_nowait()
            except queue.Empty:
                return
            self._give_back(cursor)
