"""Waiting out an outside system that is down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from embedd_dagster.errors import TransientError

T = TypeVar("T")

_LONGEST_WAIT_SECONDS = 10.0
_SLICE_SECONDS = 0.25


def retry_transient(
    action: Callable[[], T],
    *,
    patience_seconds: float,
    check: Callable[[], None],
    log: Callable[[str], None] = lambda _line: None,
) -> T:
    """The action's result; while it raises TransientError it is tried again, with backoff and full jitter.

    Gives up with the last error `patience_seconds` after the first one, however long the action was at work before that.
    `check` is called several times a second while it waits, and ends the wait by raising; `log` is told when it begins. The
    action must be idempotent.
    """

    def pause(seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            check()
            time.sleep(min(left, _SLICE_SECONDS))

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wanted = error.retry_after_seconds if isinstance(error, TransientError) else None
        backoff = wait_random_exponential(multiplier=0.2, max=_LONGEST_WAIT_SECONDS)(state)
        return backoff if wanted is None else min(max(wanted, backoff), patience_seconds)

    first_failed_at: float | None = None

    def has_run_out(state: RetryCallState) -> bool:
        nonlocal first_failed_at
        failed_at = state.outcome_timestamp or 0.0
        if first_failed_at is None:
            first_failed_at = failed_at
            error = state.outcome.exception() if state.outcome else None
            if patience_seconds > 0:
                log(f"{error} Waiting for it, up to {patience_seconds:g} seconds.")
        return failed_at - first_failed_at >= patience_seconds

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait,
        stop=has_run_out,
        sleep=pause,
        reraise=True,
    )
    return retrying(action)
