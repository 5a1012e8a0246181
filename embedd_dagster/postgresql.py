"""What sources and platform stores share of PostgreSQL: how a connection is opened, and the few that are kept open.

Not psycopg_pool: it connects in the background and reports a wrong password as a timeout, half a minute later. Here the
thread that needs a connection opens it, and gets the real error at once.

Nor are a server's timeouts enough where somebody waits for the answer: one that has frozen keeps none of them, and TCP finds
nothing wrong as long as its machine lives. So what is done within `patience` is given up on this side.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import psycopg
from psycopg import pq

Connection = psycopg.Connection[Any]
AnyConnection = TypeVar("AnyConnection", bound=psycopg.Connection[Any])
Result = TypeVar("Result")

_NO_FILE: Final = "/nonexistent/embedd"
SILENCE_SECONDS: Final = 60.0
"""After so long without a byte, a source or a platform store is asked whether it still works."""
_ANSWER_ON_ITS_WAY_SECONDS: Final = 2.0
_LONGEST_TRICKLE_SECONDS: Final = 0.5

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


class Patience:
    """What is left of the time that may be spent waiting for each server."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spent: dict[tuple[bytes, bytes, bytes], float] = {}

    def spend(self, connection: Connection, seconds: float) -> None:
        """Takes off what one operation took."""
        server = self._server(connection)
        self._spent[server] = self._spent.get(server, 0.0) + seconds

    def allows(self, connection: Connection, seconds: float) -> bool:
        """Whether an operation that has taken so long already may go on."""
        return self._spent.get(self._server(connection), 0.0) + seconds < self._seconds

    @staticmethod
    def _server(connection: Connection) -> tuple[bytes, bytes, bytes]:
        return connection.pgconn.host, connection.pgconn.port, connection.pgconn.db


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block, and in threads that run in its context, no server is waited for longer, all operations together.

    Whoever waits then gets an OperationalError, and the connection is closed. It counts for BoundedConnections; connecting
    has a timeout of its own.
    """
    token = _patience.set(Patience(seconds))
    try:
        yield
    finally:
        _patience.reset(token)


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose operations end when `patience` does, or when the server has gone silent for good."""

    longest_silence: float | None = None
    """Seconds without a byte after which `is_still_working` is asked; None: however long it takes."""

    def is_still_working(self) -> bool:
        """Whether a silent server can be expected to answer yet."""
        return False

    def wait(self, gen: Generator[Any, Any, Result], *args: Any, **kwargs: Any) -> Result:
        """As psycopg's. The generator is told every 0.1 s that nothing has come."""
        allowed = _patience.get()
        if allowed is None and self.longest_silence is None:
            return super().wait(gen, *args, **kwargs)
        return super().wait(self._bounded(gen, allowed), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, Result], allowed: Patience | None) -> Generator[Any, Any, Result]:
        begun = heard = time.monotonic()
        has_waited = False
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard = now
                elif self._is_silent(now - heard):
                    break
                else:
                    heard = max(heard, self._asked_at)
                # a server that sends a byte now and then is always ready
                if not ready or now - begun > _LONGEST_TRICKLE_SECONDS:
                    has_waited = True
                    if allowed is not None and not allowed.allows(self, now - begun):
                        break
                wanted = gen.send(ready)
        except StopIteration as done:
            result: Result = done.value
            return result
        finally:
            if has_waited and allowed is not None:
                allowed.spend(self, time.monotonic() - begun)
        gen.close()
        self.pgconn.finish()
        raise psycopg.OperationalError("the server has not answered in time")

    _asked_at = 0.0

    def _is_silent(self, seconds: float) -> bool:
        if self.longest_silence is None or seconds < self.longest_silence:
            return False
        # it may have ended the statement just when it was asked: then the answer is on its way
        works = self.is_still_working() or self._answers_within(min(self.longest_silence, _ANSWER_ON_ITS_WAY_SECONDS))
        self._asked_at = time.monotonic()
        return not works

    def _answers_within(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.pgconn.socket, select.POLLIN)
        return bool(poller.poll(seconds * 1000))


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
