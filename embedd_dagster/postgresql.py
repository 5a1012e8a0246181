"""Connections to PostgreSQL whose operations end by a deadline: the catalog's own, and the PostgreSQL connector's.

A server's timeouts are not enough where somebody waits for the answer: a frozen server keeps none of them, and TCP reports
nothing as long as its machine lives. So an operation that exceeds its deadline is given up on this side.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import psycopg

Connection = psycopg.Connection[Any]
Result = TypeVar("Result")

_ANSWER_ON_ITS_WAY_SECONDS: Final = 2.0
_LONGEST_TRICKLE_SECONDS: Final = 0.5


class Deadline:
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


_deadline: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within the block, and in threads that run in its context, no server is waited for longer, all operations together.

    Whoever waits then gets an OperationalError, and the connection is closed. It counts for BoundedConnections; connecting
    has a timeout of its own.
    """
    token = _deadline.set(Deadline(seconds))
    try:
        yield
    finally:
        _deadline.reset(token)


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose operations end when `deadline` does, or when the server has gone silent for good."""

    longest_silence: float | None = None
    """Seconds without a byte after which `is_still_working` is asked; None: however long it takes."""

    def is_still_working(self) -> bool:
        """Whether a silent server can be expected to answer yet."""
        return False

    def wait(self, gen: Generator[Any, Any, Result], *args: Any, **kwargs: Any) -> Result:
        """As psycopg's. The generator is told every 0.1 s that nothing has come."""
        allowed = _deadline.get()
        if allowed is None and self.longest_silence is None:
            return super().wait(gen, *args, **kwargs)
        return super().wait(self._bounded(gen, allowed), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, Result], allowed: Deadline | None) -> Generator[Any, Any, Result]:
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
