"""How many requests may be in flight at a provider: additive increase, multiplicative decrease."""

from __future__ import annotations

import threading
from collections.abc import Callable

_SLICE_SECONDS = 0.1
_SMALLEST_ROUND = 4


class AdaptiveGate:
    """Lets 1 … `maximum` threads through at once. It starts at the maximum, which the user has set.

    Answers are counted in rounds of as many as are in flight. If more than half of a round is refused, the number is
    halved; otherwise it grows by one. A reaction to each single refusal would be wrong: a provider that refuses one request
    in three at any load would get one request at a time, which helps nobody.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = max(1, maximum)
        self._limit = self.maximum
        self._in_flight = 0
        self._answered = self._refused = 0
        self._is_open = True
        self._condition = threading.Condition()

    @property
    def limit(self) -> int:
        """The number of threads that are let through at present."""
        return self._limit

    def start_with_one(self) -> None:
        """Lets one thread through until `open` is called."""
        self._limit = 1
        self._is_open = False

    def open(self, at_most: int) -> None:
        """Lets at most this many through, within the maximum. Does nothing if it is open already."""
        if self._is_open:
            return
        with self._condition:
            self._is_open = True
            self._limit = max(1, min(self.maximum, at_most))
            self._answered = self._refused = 0
            self._condition.notify_all()

    def enter(self, check: Callable[[], None]) -> None:
        """Waits for a place; `check` is called several times per second and ends the wait by raising."""
        with self._condition:
            while self._in_flight >= self._limit:
                self._condition.wait(_SLICE_SECONDS)
                check()
            self._in_flight += 1

    def leave(self, *, refused: bool | None) -> None:
        """Gives the place back; `refused` is None if the answer says nothing about the provider's load."""
        with self._condition:
            self._in_flight -= 1
            if refused is not None and self._is_open:
                self._count(refused=refused)
            self._condition.notify_all()

    def _count(self, *, refused: bool) -> None:
        self._answered += 1
        self._refused += refused
        if self._answered < max(self._limit, _SMALLEST_ROUND):
            return
        if 2 * self._refused > self._answered:
            self._limit = max(1, self._limit // 2)
        else:
            self._limit = min(self.maximum, self._limit + 1)
        self._answered = self._refused = 0
