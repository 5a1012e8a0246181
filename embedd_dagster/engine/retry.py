"""Repeats operations on outside systems that fail with a transient error: the one retry policy of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from embedd_dagster.errors import TransientError

P = ParamSpec("P")
T = TypeVar("T")

_LONGEST_WAIT_SECONDS = 10.0
_SLICE_SECONDS = 0.25


def _ignore(_line: str) -> None:
    pass


def _go_on() -> None:
    pass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries on TransientError, with exponential backoff and full jitter. Safe to use from several threads.

    Gives up with the last error `outage_seconds` after the first one, however long the operation took before that.
    `check` is called several times per second during a wait, and ends the wait by raising.
    """

    outage_seconds: float
    check: Callable[[], None] = _go_on
    log: Callable[[str], None] = _ignore

    def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result. The function must be idempotent. Raises its last error."""
        first_failed_at: float | None = None

        def is_exhausted(state: RetryCallState) -> bool:
            nonlocal first_failed_at
            failed_at = state.outcome_timestamp or 0.0
            if first_failed_at is None:
                first_failed_at = failed_at
                error = state.outcome.exception() if state.outcome else None
                if self.outage_seconds > 0:
                    self.log(f"{error} Retrying for up to {self.outage_seconds:g} seconds.")
            return failed_at - first_failed_at >= self.outage_seconds

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=self._wait_seconds,
            stop=is_exhausted,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(function, *args, **kwargs)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _SLICE_SECONDS))

    def _wait_seconds(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wanted = error.retry_after_seconds if isinstance(error, TransientError) else None
        backoff = wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_SECONDS)(state)
        return backoff if wanted is None else min(max(wanted, backoff), self.outage_seconds)
