"""One task's run: its context, its vector table, its progress and the duration of its stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from embedd_dagster.catalog import vector_sets, vector_tables
from embedd_dagster.catalog.tables import Task, VectorSetRow
from embedd_dagster.core.counts import RowCounts, progress_to_json
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.lease import TaskLease
from embedd_dagster.engine.pipeline import RowPipeline
from embedd_dagster.engine.resources import ConnectionResources
from embedd_dagster.engine.retry import RetryPolicy
from embedd_dagster.engine.reuse import VECTOR_BYTES, TextMemory
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import RunCancelled


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run works through its rows; the defaults suit production."""

    page_rows: int = 2_000
    """Rows per page of a shard."""
    checkpoint_seconds: float = 1.0
    report_seconds: float = 10.0
    """How often a long stage logs how far it is."""
    reuse_bytes: int = VECTOR_BYTES
    """How much memory the vectors of the texts embedded last may take."""


@dataclass(slots=True)
class Progress:
    """How far a run is. Safe to use from several threads."""

    total_rows: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    last_key: Key | None = None
    stage: str | None = None
    """The current stage; None before the first."""
    rows_indexed: int | None = None
    """In stage `index`: how many vectors the store has indexed, as far as it can tell."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counts: RowCounts, last_key: Key | None = None) -> None:
        """Adds what became of some rows."""
        with self._lock:
            self.counts.add(counts)
            self.last_key = last_key if last_key is not None else self.last_key

    def replace(self, counts: Iterable[Mapping[str, int]], last_key: Key | None = None) -> None:
        """Sets the counts to the sum of those of all shards."""
        total = RowCounts()
        for shard in counts:
            total.add(RowCounts(**shard))
        with self._lock:
            self.counts = total
            self.last_key = last_key if last_key is not None else self.last_key

    def begin_stage(self, name: str) -> None:
        """Names the stage that the run is in from now on."""
        with self._lock:
            self.stage, self.rows_indexed = name, None

    def to_json(self) -> Mapping[str, Any]:
        """The task's `progress`, as the API shows it."""
        with self._lock:
            return progress_to_json(
                self.counts,
                total_rows=self.total_rows,
                last_key=self.last_key,
                stage=self.stage,
                rows_indexed=self.rows_indexed,
            )


class TaskRun:
    """What a run knows and counts of its task; a context manager that renews the lease and closes what was opened."""

    def __init__(
        self,
        runtime: Runtime,
        task: Task,
        run_id: str,
        *,
        log: Callable[[str], None],
        should_stop: Callable[[], bool],
        options: RunOptions,
    ) -> None:
        """Opens the source and the store. Raises RunCancelled if the vector table was deleted."""
        self.runtime = runtime
        self.settings = runtime.settings
        self.task = task
        self.run_id = run_id
        self.options = options
        self.progress = Progress(total_rows=task.progress.get("total_rows", 0))
        self.caught_up = RowCounts()
        """What catching up with the source took, beyond the rows of the load itself."""
        self.seconds: dict[str, float] = {}
        """The duration of each stage."""
        self.requests = self.retries = 0
        """Requests to the provider that were made in other processes."""
        with runtime.catalog.transaction() as session:
            endpoints = vector_tables.load_endpoints(session, task.target_id)
        if endpoints is None or endpoints.vector_table.deleted_at is not None:
            raise RunCancelled("The vector table was deleted.")
        self.table = endpoints.vector_table
        self.provider = endpoints.embedding_provider
        self.lease = TaskLease(
            runtime.catalog,
            task.id,
            run_id,
            heartbeat_seconds=self.settings.heartbeat_seconds,
            progress=self.progress.to_json,
            log=log,
            should_stop=should_stop,
        )
        outage_seconds = self.settings.outage_patience_seconds
        self.context = RunContext(
            lease=self.lease,
            resources=ConnectionResources(
                runtime, endpoints.connection, outage_seconds=outage_seconds, check=self.lease.check
            ),
            retry=RetryPolicy(outage_seconds, self.lease.check, log),
            log=log,
        )
        self._closing = ExitStack()
        self._closing.callback(self.context.resources.close)

    def __enter__(self) -> Self:
        self.lease.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lease.stop()
        self._closing.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage of the run, and shows it in the log and in the task's progress."""
        self.context.check()
        self.context.log(f"Stage {name} begins.")
        self.progress.begin_stage(name)
        self.lease.renew_soon()
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def has_option(self, name: str) -> bool:
        """Whether this option of the task is on: `full`, `retry_failed`, `confirm_mass_delete`."""
        return bool(self.task.options.get(name))

    def live_set(self) -> VectorSetRow | None:
        """The catalog's record of the live version as it is now, or None."""
        if self.table.live_version is None:
            return None
        with self.runtime.catalog.transaction() as session:
            return vector_sets.get(session, self.table.id, self.table.live_version)

    def vector_set(self, row: VectorSetRow) -> VectorSet:
        """What the store must know of a version of this vector table."""
        return vector_sets.as_vector_set(row, self.table.storage_name)

    def has_set(self, row: VectorSetRow) -> bool:
        """Whether the store has this version: a store that lost its data does not."""
        return row.version in self.context.retry(self.context.store.versions, row.vector_table_id)

    def pipeline(self, row: VectorSetRow, reuse_from: list[VectorSet]) -> RowPipeline:
        """The pipeline into a version, by the configuration that the version is built from."""
        configuration = VectorConfiguration.from_json(row.configuration)
        return RowPipeline(
            self.context,
            self.vector_set(row),
            configuration,
            self.context.resources.embedder(configuration, self.provider),
            reuse_from=reuse_from,
            memory=self._closing.enter_context(closing(TextMemory(self.options.reuse_bytes))),
        )
