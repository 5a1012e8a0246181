"""How long an operation may wait for other systems.

A server's own timeouts are not enough when somebody waits for the answer: a frozen server keeps none of them, and TCP
reports nothing while its machine lives. So an operation that exceeds its deadline is given up on this side.

A connector does not read the deadline of the present operation from here. It is given a `DeadlineSource` when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Deadline:
    """How many seconds may be spent waiting for each server, all operations together."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spent: dict[Hashable, float] = {}

    def spend(self, server: Hashable, seconds: float) -> None:
        """Subtracts the seconds that one operation waited for this server."""
        self._spent[server] = self._spent.get(server, 0.0) + seconds

    def seconds_left(self, server: Hashable) -> float:
        """The seconds that may still be spent waiting for this server; 0 or less if none are left."""
        return self._seconds - self._spent.get(server, 0.0)


DeadlineSource = Callable[[], Deadline | None]
"""Returns the deadline of the present operation; None if it has none. Called from any thread."""

_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within the block, and in threads that run in its context, `current_deadline` is a new deadline of so many seconds."""
    token = _current.set(Deadline(seconds))
    try:
        yield
    finally:
        _current.reset(token)


def current_deadline() -> Deadline | None:
    """The deadline of the innermost `deadline` block; None outside of one."""
    return _current.get()


def no_deadline() -> None:
    """A `DeadlineSource` for operations that may take any time."""
