"""Keeps a few connections open while idle.

Not psycopg_pool: it connects in the background and reports a wrong password as a timeout, half a minute later. Here the
thread that needs a connection opens it, and gets the real error at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import psycopg
from psycopg import pq

from embedd_dagster.connectors.postgresql.sessions import ScopedConnection
from embedd_dagster.errors import EmbeddError


class ConnectionPool:
    """Idle connections to one database. Safe to use from several threads; opens nothing by itself.

    As many connections are open as threads use one at once; `kept` of them stay open. After `close`, `closed_error` is raised.
    """

    def __init__(
        self, open_connection: Callable[[], ScopedConnection], *, closed_error: Callable[[], Exception], kept: int = 4
    ) -> None:
        self._open = open_connection
        self._kept = kept
        self._closed_error = closed_error
        self._lock = threading.Lock()
        self._idle: list[ScopedConnection] = []
        self._closed = False

    @contextmanager
    def transaction(self, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[ScopedConnection]:
        """A connection in a transaction with these settings: committed after the block, rolled back if it raises."""
        connection = self.take(lambda taken: taken.begin(settings))
        try:
            yield connection
            connection.end()
        except (EmbeddError, psycopg.Error):
            connection.abandon()
            raise
        except BaseException:
            connection.close()
            raise
        finally:
            self.give_back(connection)

    def take(self, begin: Callable[[ScopedConnection], object] | None = None) -> ScopedConnection:
        """An idle connection, or a new one. Raises what opening it raises.

        `begin` is called with it first. An idle connection on which that fails has died unnoticed, and is replaced. Without
        `begin`, an idle connection may turn out to be dead.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise self._closed_error()
                connection = self._idle.pop() if self._idle else None
            is_new = connection is None
            if connection is None:
                connection = self._open()
            try:
                if begin is not None:
                    begin(connection)
            except BaseException as error:
                connection.close()
                if is_new or not isinstance(error, psycopg.Error):
                    raise
            else:
                return connection

    def give_back(self, connection: ScopedConnection) -> None:
        """Keeps the connection for the next caller. Closes it if it is broken, or if a statement is still open on it."""
        usable = not connection.closed and connection.info.transaction_status is pq.TransactionStatus.IDLE
        with self._lock:
            if usable and not self._closed and len(self._idle) < self._kept:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Closes idle connections now, and borrowed ones when they come back. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
