"""Connections to PostgreSQL whose operations end by a deadline: the catalog's own, and the PostgreSQL connector's."""

from __future__ import annotations

import select
import time
from collections.abc import Generator, Hashable
from typing import Any, Final, TypeVar

import psycopg

from embedd_dagster.deadlines import Deadline, DeadlineSource, no_deadline

Connection = psycopg.Connection[Any]
Result = TypeVar("Result")

_ANSWER_ON_ITS_WAY_SECONDS: Final = 2.0
_LONGEST_TRICKLE_SECONDS: Final = 0.5


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose operations end by a deadline, or when the server has gone silent for good.

    An operation that is given up raises OperationalError, and the connection is closed. Connecting has its own timeout.
    """

    current_deadline: DeadlineSource = staticmethod(no_deadline)
    """Asked at the start of each operation."""
    longest_silence: float | None = None
    """Seconds without a byte after which `is_still_working` is asked. None: never."""

    def is_still_working(self) -> bool:
        """Whether a silent server can still be expected to answer."""
        return False

    def wait(self, gen: Generator[Any, Any, Result], *args: Any, **kwargs: Any) -> Result:
        """As psycopg's, which resumes the generator every 0.1 s if nothing has arrived."""
        deadline = self.current_deadline()
        if deadline is None and self.longest_silence is None:
            return super().wait(gen, *args, **kwargs)
        return super().wait(self._bounded(gen, deadline), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, Result], deadline: Deadline | None) -> Generator[Any, Any, Result]:
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
                    if deadline is not None and now - begun >= deadline.seconds_left(self._server()):
                        break
                wanted = gen.send(ready)
        except StopIteration as done:
            result: Result = done.value
            return result
        finally:
            if has_waited and deadline is not None:
                deadline.spend(self._server(), time.monotonic() - begun)
        gen.close()
        self.pgconn.finish()
        raise psycopg.OperationalError("the server has not answered in time")

    def _server(self) -> Hashable:
        return self.pgconn.host, self.pgconn.port, self.pgconn.db

    _asked_at = 0.0

    def _is_silent(self, seconds: float) -> bool:
        if self.longest_silence is None or seconds < self.longest_silence:
            return False
        # the server may have ended the statement just before it was asked: then the answer is on its way
        works = self.is_still_working() or self._answers_within(min(self.longest_silence, _ANSWER_ON_ITS_WAY_SECONDS))
        self._asked_at = time.monotonic()
        return not works

    def _answers_within(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.pgconn.socket, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
