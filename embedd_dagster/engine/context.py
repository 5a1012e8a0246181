"""The run context: what a task's run, a shard worker and a CDC consumer need to read, write and wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.lease import Lease
from embedd_dagster.engine.resources import ConnectionResources
from embedd_dagster.engine.retry import RetryPolicy
from embedd_dagster.errors import RunCancelled
from embedd_dagster.protocols.source import Selection, Source, TableReader
from embedd_dagster.protocols.store import Store

P = ParamSpec("P")
T = TypeVar("T")

_OWNED_SECONDS: Final = 0.25
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first goes on while a machine sleeps


@dataclass(slots=True)
class RunContext:
    """A lease, open resources, a retry policy and a log. Safe to use from several threads.

    Catalog writes go through `record`, store writes through `write_as_owner`, reads through `retry`, and every batch
    calls `check`: a run that lost its lease, or was asked to end, writes nothing more.
    """

    lease: Lease
    resources: ConnectionResources
    retry: RetryPolicy
    log: Callable[[str], None]
    _owned_at: float = field(default=float("-inf"), init=False)

    @property
    def source(self) -> Source:
        """The connection's source."""
        return self.resources.source

    @property
    def store(self) -> Store:
        """Where the connection's vectors are."""
        return self.resources.store

    def check(self) -> None:
        """Returns while the run may go on. Raises RunSuperseded, RunCancelled."""
        self.lease.check()

    def write_as_owner(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of an idempotent write to the store, retried while the store is down.

        Heartbeats are too slow to protect the store: a process that was suspended wakes up with rows that its successor
        has since written again. So the catalog is asked before a write who owns the lease, at most four times per second.
        Raises RunSuperseded.
        """

        def write_if_owned() -> T:
            asked_at = time.clock_gettime(_CLOCK)
            if asked_at - self._owned_at > _OWNED_SECONDS:
                # a run that was asked to end still owns its lease, and what it has paid for is kept
                with suppress(RunCancelled), self.lease.fenced():
                    pass
                self._owned_at = asked_at
            return function(*args, **kwargs)

        return self.retry(write_if_owned)

    def record(self, action: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of an idempotent action in a fenced catalog transaction, retried while the catalog is down."""

        def transact() -> T:
            with self.lease.fenced() as session:
                return action(session, *args, **kwargs)

        return self.retry(transact)

    def reader(self, configuration: VectorConfiguration) -> TableReader:
        """A reader of the configured table."""
        selection = Selection(
            configuration.source_table,
            configuration.primary_key_column,
            configuration.column_names,
            configuration.filter_types,
        )
        return self.retry(self.source.reader, selection)

    def record_failures(self, session: Session, vector_set: VectorSet, failures: list[RowFailure]) -> None:
        """Keeps failed rows in a fenced transaction, and logs how many."""
        if failures:
            failed_rows.record(session, vector_set, failures)
            first = failures[0]
            self.log(f"{vector_set.vector_table_id}: {len(failures)} rows failed at step {first.step}: {first.code}.")
