"""Leases: proof that a run owns what it works on. A heartbeat renews a lease; fencing rejects the writes of a lost one."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from sqlalchemy.orm import Session

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.errors import RunCancelled, RunSuperseded, TransientError


class Lease(Protocol):
    """A run's claim on a task or a CDC stream. Safe to use from several threads."""

    def check(self) -> None:
        """Returns while the run may go on. Raises RunSuperseded, RunCancelled. Cheap: called for every batch."""
        ...

    def fenced(self) -> AbstractContextManager[Session]:
        """A catalog transaction that commits only while this run owns the lease. Raises RunSuperseded, RunCancelled."""
        ...


class HeartbeatLease(ABC):
    """A lease that a thread renews every `heartbeat_seconds`, from `start` to `stop`."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        heartbeat_seconds: float,
        log: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._catalog = catalog
        self._heartbeat_seconds = heartbeat_seconds
        self._log = log
        self._should_stop = should_stop
        self._stopped_by: BaseException | None = None
        self._is_stopped = threading.Event()
        self._is_due = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @abstractmethod
    def _assert_owner(self, session: Session) -> None:
        """Returns while this run owns the lease, which is locked until the transaction ends."""

    @abstractmethod
    def _renew(self) -> None:
        """Writes one heartbeat. Raises RunSuperseded, RunCancelled, TransientError."""

    def start(self) -> None:
        """Begins to renew the lease."""
        self._thread.start()

    def stop(self) -> None:
        """Ends renewing it. Idempotent."""
        self._is_stopped.set()
        self._is_due.set()
        if self._thread.is_alive():
            self._thread.join()

    def renew_soon(self) -> None:
        """Has a heartbeat written now instead of at its time; does not wait for it."""
        self._is_due.set()

    def check(self) -> None:
        """Returns while the run may go on. Raises RunSuperseded, RunCancelled."""
        if self._stopped_by is not None:
            raise self._stopped_by
        if self._should_stop():
            raise RunCancelled("The run was asked to end.")

    def stop_work(self, error: BaseException) -> None:
        """Makes `check` raise in every thread of this run, because one part of it failed."""
        self._stopped_by = self._stopped_by or RunCancelled(f"Another part of the run failed: {type(error).__name__}")

    @contextmanager
    def fenced(self) -> Iterator[Session]:
        """A catalog transaction that commits only while this run owns the lease."""
        with self._catalog.transaction() as session:
            self._assert_owner(session)
            yield session

    def _beat(self) -> None:
        while True:
            self._is_due.wait(self._heartbeat_seconds)
            self._is_due.clear()
            if self._is_stopped.is_set():
                return
            try:
                self._renew()
            except (RunSuperseded, RunCancelled) as error:
                self._stopped_by = error
                return
            except TransientError as error:
                self._log(f"Heartbeat not written: {error}")  # the next one may be; a long silence ends the run


class TaskLease(HeartbeatLease):
    """A run's lease of its task; each heartbeat writes the task's progress.

    Without `progress` (in a shard's own process) it only asks the catalog whether the run still owns the task.
    """

    def __init__(
        self,
        catalog: Catalog,
        task_id: str,
        run_id: str,
        *,
        heartbeat_seconds: float,
        progress: Callable[[], Mapping[str, Any]] | None,
        log: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        super().__init__(catalog, heartbeat_seconds=heartbeat_seconds, log=log, should_stop=should_stop)
        self._task_id = task_id
        self._run_id = run_id
        self._progress = progress

    def _assert_owner(self, session: Session) -> None:
        tasks.assert_owner(session, self._task_id, self._run_id)

    def _renew(self) -> None:
        with self._catalog.transaction() as session:
            if self._progress is None:
                self._assert_owner(session)
            else:
                tasks.heartbeat(session, self._task_id, self._run_id, self._progress())
