"""Requests and tokens per minute: how long the next request to a provider waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

_BURST_SECONDS = 1.0


class Budget(Protocol):
    """The limit of an account per minute. Safe to use from several threads.

    An instance counts the use of this process only, or (in the catalog, in Redis) of all processes.
    """

    def acquire(self, requests: int, tokens: int) -> float:
        """Seconds to wait before a request of this size is sent. It is booked now, even if it is never sent."""
        ...


class InProcessBudget:
    """A budget for the runs of one process: two token buckets of one second's worth, None for no limit.

    The small burst keeps any minute within 1/60 of the limit. A larger request goes out once everything before it is paid
    off, and the requests after it wait.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        # the instant when everything booked so far is paid off
        self._requests_paid_at = self._tokens_paid_at = float("-inf")

    @classmethod
    def from_limits(
        cls, limits: Mapping[str, int | None] | None, *, clock: Callable[[], float] = time.monotonic
    ) -> InProcessBudget:
        """The budget that a provider's `limits` ask for."""
        limits = limits or {}
        return cls(
            requests_per_minute=limits.get("requests_per_minute"),
            tokens_per_minute=limits.get("tokens_per_minute"),
            clock=clock,
        )

    def acquire(self, requests: int, tokens: int) -> float:
        """Seconds to wait before a request of this size is sent; it is booked."""
        with self._lock:
            now = self._clock()
            earliest = now - _BURST_SECONDS
            self._requests_paid_at = max(self._requests_paid_at, earliest)
            self._tokens_paid_at = max(self._tokens_paid_at, earliest)
            start = max(now, self._requests_paid_at, self._tokens_paid_at)
            self._requests_paid_at += requests * self._seconds_per_request
            self._tokens_paid_at += tokens * self._seconds_per_token
            return start - now
