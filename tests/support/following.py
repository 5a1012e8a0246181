"""A follower in a thread, as a run of it would be: with its log, its reports, and an end when it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self
from uuid import uuid4

from embedd_dagster.engine.follow import follow
from embedd_dagster.engine.follow_reports import FollowReport
from embedd_dagster.engine.runtime import Runtime


class RunningFollower:
    """Follows one connection while the block lasts; what kept it from following is raised at the end."""

    def __init__(self, runtime: Runtime, connection_id: str) -> None:
        self.run_id = uuid4().hex
        self.log: list[str] = []
        self.reports: list[FollowReport] = []
        self.reason: str | None = None
        self.error: BaseException | None = None
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(runtime, connection_id), daemon=True)

    def _run(self, runtime: Runtime, connection_id: str) -> None:
        try:
            self.reason = follow(
                runtime,
                connection_id,
                self.run_id,
                log=self.log.append,
                report=self.reports.append,
                should_stop=self._told.is_set,
            )
        except BaseException as error:  # told when the block ends
            self.error = error

    def stop(self) -> None:
        """Tells it to end, and waits."""
        self._told.set()
        self.join()

    def join(self, within: float = 60) -> None:
        """Waits for its end."""
        self._thread.join(within)
        assert not self._thread.is_alive(), "the follower does not end"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self.error is not None:
            raise self.error


def eventually(holds: Callable[[], object], within: float = 30) -> None:
    """Returns once it holds; fails with what it last said."""
    until = time.monotonic() + within
    while True:
        try:
            if holds():
                return
            failure = None
        except AssertionError as error:
            failure = error
        if time.monotonic() > until:
            raise failure or AssertionError("it does not come true")
        time.sleep(0.05)
