"""One run's work on one vector table: its task, what is open for it, its heartbeat, its progress and its stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, tasks, vector_sets, vector_tables
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.catalog.tables import Task, VectorSetRow
from embedd_dagster.core.keys import Key, render_key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.opened import Opened
from embedd_dagster.engine.pipeline import RowCounts, RowPipeline
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import RunCancelled, RunSuperseded, TransientError

T = TypeVar("T")


@dataclass(slots=True)
class Progress:
    """How far a run is. Safe to use from several threads."""

    total_rows: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    last_key: Key | None = None
    stage: str | None = None
    """What the run is doing now; None before its first stage."""
    rows_indexed: int | None = None
    """In stage `index`: how many vectors the store has indexed so far, as far as it can tell."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counts: RowCounts, last_key: Key | None = None) -> None:
        """Adds what became of some rows."""
        with self._lock:
            self.counts.add(counts)
            self.last_key = last_key if last_key is not None else self.last_key

    def begin_stage(self, name: str) -> None:
        """Says what the run does from now on."""
        with self._lock:
            self.stage, self.rows_indexed = name, None

    def to_json(self) -> dict[str, Any]:
        """The task's `progress` (SPEC §2)."""
        with self._lock:
            return {
                "rows_processed": self.counts.read,
                "total_rows": max(self.total_rows, self.counts.read),
                "rows_failed": self.counts.failed,
                "rows_skipped": self.counts.skipped,
                "rows_truncated": self.counts.truncated,
                "tokens": self.counts.tokens,
                "last_processed_pk": None if self.last_key is None else render_key(self.last_key),
                "stage": self.stage,
                "rows_indexed": self.rows_indexed,
            }


class Work:
    """Everything a run needs for one task; a context manager that gives back what it opened.

    Every catalog write goes through `fenced`, every write to the store through `as_owner`, every wait and every batch
    through `check`: so a run that lost its task, or was asked to end, writes nothing more.
    """

    def __init__(
        self, runtime: Runtime, task: Task, run_id: str, *, log: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> None:
        self.runtime = runtime
        self.settings = runtime.settings
        self.task = task
        self.run_id = run_id
        self.log = log
        self.progress = Progress(total_rows=task.progress.get("total_rows", 0))
        self.caught_up = RowCounts()
        """What catching up with the source took, beyond the rows of the load itself."""
        self.seconds: dict[str, float] = {}
        self._should_stop = should_stop
        self._stopped_by: BaseException | None = None
        self._ended = threading.Event()
        self._beat_due = threading.Event()
        with runtime.catalog.transaction() as session:
            endpoints = vector_tables.load_endpoints(session, task.target_id)
        if endpoints is None or endpoints.vector_table.deleted_at is not None:
            raise RunCancelled("The vector table was deleted.")
        self.table = endpoints.vector_table
        self._provider = endpoints.embedding_provider
        self._memories = ExitStack()
        self._opened = Opened(
            runtime,
            endpoints.connection,
            check=self.check,
            fenced=self.fenced,
            log=log,
            patience_seconds=self.settings.outage_patience_seconds,
        )
        self.source, self.store = self._opened.source, self._opened.store
        self.patiently, self.as_owner, self.reader = self._opened.patiently, self._opened.as_owner, self._opened.reader
        self.embedder_counters = self._opened.embedder_counters

    def __enter__(self) -> Self:
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beat_due.set()
        self._heart.join()
        self._memories.close()
        self._opened.close()

    def _beat(self) -> None:
        while True:
            self._beat_due.wait(self.settings.heartbeat_seconds)
            self._beat_due.clear()
            if self._ended.is_set():
                return
            try:
                with self.runtime.catalog.transaction() as session:
                    tasks.heartbeat(session, self.task.id, self.run_id, self.progress.to_json())
            except (RunSuperseded, RunCancelled) as error:
                self._stopped_by = error
                return
            except TransientError as error:
                self.log(f"Heartbeat not written: {error}")  # the next one may be; too long a silence ends the run

    def check(self) -> None:
        """Returns while the run may go on. Raises RunSuperseded, RunCancelled."""
        if self._stopped_by is not None:
            raise self._stopped_by
        if self._should_stop():
            raise RunCancelled("The run was asked to end.")

    def stop_others(self, error: BaseException) -> None:
        """Makes `check` raise in every thread of this run: one part of it failed."""
        self._stopped_by = self._stopped_by or RunCancelled(f"Another part of the run failed: {type(error).__name__}")

    def show_progress(self) -> None:
        """Has the task's progress written to the catalog soon, without waiting for it or for the next heartbeat."""
        self._beat_due.set()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage of the run, and says when it begins: in the log and in the task's progress."""
        self.check()
        self.log(f"Stage {name} begins.")
        self.progress.begin_stage(name)
        self.show_progress()
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    @contextmanager
    def fenced(self) -> Iterator[Session]:
        """A catalog transaction that commits only while this run owns its task."""
        with self.runtime.catalog.transaction() as session:
            tasks.assert_owner(session, self.task.id, self.run_id)
            yield session

    def record(self, action: Callable[[Session], T]) -> T:
        """Does an idempotent action in a fenced transaction; a catalog that is down is waited for."""

        def transact() -> T:
            with self.fenced() as session:
                return action(session)

        return self.patiently(transact)

    def live_set(self) -> VectorSetRow | None:
        """The live version's record as it is now, or None."""
        if self.table.live_version is None:
            return None
        with self.runtime.catalog.transaction() as session:
            return vector_sets.get(session, self.table.id, self.table.live_version)

    def vector_set(self, row: VectorSetRow) -> VectorSet:
        """What the store must know of a version of this vector table."""
        return vector_sets.as_vector_set(row, self.table.storage_name)

    def has_set(self, row: VectorSetRow) -> bool:
        """Whether the store has this version: one that lost its data has not."""
        return row.version in self.patiently(lambda: self.store.versions(row.vector_table_id))

    def pipeline(self, row: VectorSetRow, reuse_from: list[VectorSet]) -> RowPipeline:
        """The pipeline into a version, by the configuration that version is built from."""
        return self._opened.pipeline(
            self.vector_set(row),
            VectorConfiguration.from_json(row.configuration),
            self._provider,
            reuse_from=reuse_from,
            memory=self._memories.enter_context(closing(TextMemory())),
        )

    def record_failures(self, session: Session, vector_set: VectorSet, failures: list[RowFailure]) -> None:
        """Keeps failed rows in a fenced transaction, and says so in the log."""
        if failures:
            failed_rows.record(session, vector_set, failures)
            self.log(f"{len(failures)} rows failed at step {failures[0].step}: {failures[0].code}.")
