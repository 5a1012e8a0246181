"""How a run learns that it is to end: asked by somebody in the UI, or because its process is told to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import dagster as dg
from dagster._core.execution.backfill import BulkActionStatus

from embedd_dagster.defs.tags import BACKFILL_TAG
from embedd_dagster.errors import TransientError

GIVEN_UP_BACKFILL = frozenset({BulkActionStatus.FAILING, BulkActionStatus.FAILED})
"""Dagster itself gave the backfill up, and cancels its runs. One that somebody cancels is CANCELING, then CANCELED."""

_HELD_BACK_SECONDS: Final = 25.0
"""Less than the supervisor gives the code server and its runs, more than a run needs to give its task back."""


def cancel_was_asked_for(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether somebody asked for the run to end, rather than Dagster because it gave up the whole backfill."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.status not in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
        return False
    backfill_id = run.tags.get(BACKFILL_TAG)
    backfill = instance.get_backfill(backfill_id) if backfill_id is not None else None
    return backfill is None or backfill.status not in GIVEN_UP_BACKFILL


class WorkerStopped(TransientError):
    """The run's process was told to stop, as in a restart; nobody asked for the task to end, so it is done again.

    However often: any number of deployments may fall into one long backfill, which goes on where it was.
    """

    is_attempt = False


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """As `stop_signal`, for a run that ends well when anything asks it to stop."""
    with stop_signal(lambda: True) as should_stop:
        yield should_stop


@contextmanager
def stop_signal(cancelled: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """What tells the engine, at its next check, whether to stop: True where `cancelled` says that somebody wants it.

    The callable raises WorkerStopped where the process is told to stop without that. Without this, Dagster would raise in the
    middle of what the main thread does, such as a commit. Further signals are held back for a while: a supervisor and
    Dagster's code server each send one for the same end. After that, a signal does what Dagster does with it.
    """
    told = threading.Event()
    told_at = 0.0

    def should_stop() -> bool:
        if not told.is_set():
            return False
        if cancelled():
            return True
        raise WorkerStopped("The process of the run was told to stop.")

    if threading.current_thread() is not threading.main_thread():  # Python hears signals in the main thread alone
        yield should_stop
        return
    previous: dict[signal.Signals, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal told_at
        now = time.monotonic()
        if not told.is_set():
            told_at = now
        elif now - told_at > _HELD_BACK_SECONDS and callable(previous[signal.Signals(number)]):
            previous[signal.Signals(number)](number, frame)
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, hear)
    try:
        yield should_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
