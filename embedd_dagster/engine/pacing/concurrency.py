"""How many requests may be in flight at a provider: additive increase, multiplicative decrease."""

from __future__ import annotations

import threading
from collections.abc import Callable

_SLICE_SECONDS = 0.1
_SMALLEST_ROUND = 4


class AdaptiveGate:
    """Lets 1 … `maximum` threads through at once. It starts wide open: the maximum is the user's word.

    Answers are counted in rounds of as many as are in flight. A round with more than half of its requests refused
    halves the number; any other adds one. Reacting to each single refusal would be wrong: a provider that refuses one
    request in three, whatever is in flight, would be worked with one request at a time, and nobody would be helped.
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
        """How many are let through at present."""
        return self._limit

    def start_with_one(self) -> None:
        """Lets one through until `open` is called."""
        self._limit = 1
        self._is_open = False

    def open(self, at_most: int) -> None:
        """Lets as many through as this, within the maximum, if it has not been opened yet."""
        if self._is_open:
            return
        with self._condition:
            self._is_open = True
            self._limit = max(1, min(self.maximum, at_most))
            self._answered = self._refused = 0
            self._condition.notify_all()

    def enter(self, check: Callable[[], None]) -> None:
        """Waits for a place; `check` is called several times a second and ends the wait by raising."""
        with self._condition:
            while self._in_flight >= self._limit:
                self._condition.wait(_SLICE_SECONDS)
                check()
            self._in_flight += 1

    def leave(self, *, refused: bool | None) -> None:
        """Gives the place back; `refused` is None where the answer says nothing about the provider's load."""
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
