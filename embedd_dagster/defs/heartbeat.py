"""The heartbeat of a run's process, kept up through every step of the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedd_dagster.catalog import run_heartbeats
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import TransientError


@contextmanager
def heartbeat(runtime: Runtime, run_id: str, log: Callable[[str], None]) -> Iterator[None]:
    """Says every few seconds that the run's process is alive, until the block ends.

    A task's own heartbeat says who owns the task; this one goes on while the run owns none, as while it checks the asset.
    """
    ended = threading.Event()

    def beat() -> None:
        while True:
            try:
                with runtime.catalog.transaction() as session:
                    run_heartbeats.beat(session, run_id)
            except TransientError as error:
                log(f"Heartbeat of the run not written: {error}")  # the sensors forgive silence during an outage
            if ended.wait(runtime.settings.heartbeat_seconds):
                return

    thread = threading.Thread(target=beat, name="run-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
