"""Connections to somebody's PostgreSQL: with which options one is opened, and the few that are kept open while idle.

Not psycopg_pool: it connects in the background and reports a wrong password as a timeout, half a minute later. Here the
thread that needs a connection opens it, and gets the real error at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import psycopg
from psycopg import pq

AnyConnection = TypeVar("AnyConnection", bound=psycopg.Connection[Any])

_NO_FILE: Final = "/nonexistent/embedd"
SILENCE_SECONDS: Final = 60.0
"""After so long without a byte, a source or a platform store is asked whether it still works."""

CONNECT_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "application_name": "embedd",
        "client_encoding": "UTF8",
        "options": "",  # else PGOPTIONS of our own environment would count
        # nor must a password or a certificate of whoever runs this service open a user's connection
        "passfile": _NO_FILE,
        "sslcert": _NO_FILE,
        "sslkey": _NO_FILE,
        "sslcertmode": "disable",
        "target_session_attrs": "any",
        "load_balance_hosts": "disable",
        "gssencmode": "disable",
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "autocommit": True,
        # a pooler such as PgBouncer may stand between, and plans must follow a growing table
        "prepare_threshold": None,
    }
)


def host_parameters(host: str, port: int, addresses: Sequence[str]) -> dict[str, Any]:
    """What makes libpq connect to these vetted addresses and nowhere else.

    The name stays beside each address: the server's certificate is checked against it.
    """
    return {"host": ",".join([host] * len(addresses)), "hostaddr": ",".join(addresses), "port": port}


class ConnectionPool(Generic[AnyConnection]):
    """Connections that are kept open while idle. Safe to use from several threads; opens nothing by itself.

    As many are open as there are threads at work; `kept` of them stay. `closed_error` is what to raise after `close`.
    """

    def __init__(
        self, open_connection: Callable[[], AnyConnection], *, kept: int, closed_error: Callable[[], Exception]
    ) -> None:
        self._open = open_connection
        self._kept = kept
        self._closed_error = closed_error
        self._lock = threading.Lock()
        self._idle: list[AnyConnection] = []
        self._closed = False

    def take(self, begin: Callable[[AnyConnection], object] | None = None) -> AnyConnection:
        """An idle connection, or a new one. Raises what opening it raises.

        `begin` is done with it first: an idle connection that fails at that has died unnoticed, and is replaced. Without
        it, an idle connection may turn out to be dead.
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

    def give_back(self, connection: AnyConnection) -> None:
        """Keeps the connection for the next; closes it where it is of no more use, or a statement is still open on it."""
        usable = not connection.closed and connection.info.transaction_status is pq.TransactionStatus.IDLE
        with self._lock:
            if usable and not self._closed and len(self._idle) < self._kept:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Idle connections are closed now, borrowed ones when they come back. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
