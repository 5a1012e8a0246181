"""What a run has open of one connection: its source, its store, and the embedders of its vector tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from typing import Final, TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog.provider_budgets import CatalogBudget
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.engine.pipeline import RowPipeline
from embedd_dagster.engine.retry import retry_transient
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import RunCancelled
from embedd_dagster.protocols.source import Selection, Source, TableReader
from embedd_dagster.protocols.store import Store

T = TypeVar("T")

_OWNED_SECONDS: Final = 0.25
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first goes on while a machine sleeps


class Opened:
    """One connection's source and store, and embedders as they are asked for. Safe to use from several threads."""

    def __init__(
        self,
        runtime: Runtime,
        connection: Connection,
        *,
        check: Callable[[], None],
        fenced: Callable[[], AbstractContextManager[Session]],
        log: Callable[[str], None],
        patience_seconds: float,
    ) -> None:
        """`check` is called while something is waited for, and ends the wait by raising; `fenced` raises in a lost run."""
        self._runtime = runtime
        self._connection = connection
        self._check = check
        self._fenced = fenced
        self._log = log
        self._owned_at = float("-inf")
        self._patience_seconds = patience_seconds
        self._resources = ExitStack()
        self._embedders: dict[tuple[str | None, datetime | None, str, int], PacedEmbedder] = {}
        self.source: Source = self._resources.enter_context(runtime.open_source(connection))
        self.store: Store = self._resources.enter_context(runtime.open_store(Mode(connection.mode), connection))

    def close(self) -> None:
        """Gives back whatever was opened."""
        self._resources.close()

    def patiently(self, action: Callable[[], T]) -> T:
        """The result of an idempotent action on an outside system, waited for while that is down."""
        return retry_transient(action, patience_seconds=self._patience_seconds, check=self._check, log=self._log)

    def as_owner(self, write: Callable[[], T]) -> T:
        """The result of an idempotent write to the store, waited for while that is down; none of a run that was replaced.

        Heartbeats are too slow to tell: a process that was stopped, or whose machine slept, wakes up with what it has read
        before its successor wrote the same rows anew. So the catalog is asked before a write, a few times a second.
        """

        def write_if_owned() -> T:
            asked_at = time.clock_gettime(_CLOCK)
            if asked_at - self._owned_at > _OWNED_SECONDS:
                # one that was asked to end owns it still, and what it has paid for is kept
                with suppress(RunCancelled), self._fenced():
                    pass
                self._owned_at = asked_at
            return write()

        return self.patiently(write_if_owned)

    def reader(self, configuration: VectorConfiguration) -> TableReader:
        """A reader of the configured table."""
        selection = Selection(
            configuration.source_table,
            configuration.primary_key_column,
            configuration.column_names,
            configuration.filter_types,
        )
        return self.patiently(lambda: self.source.reader(selection))

    def pipeline(
        self,
        vector_set: VectorSet,
        configuration: VectorConfiguration,
        provider: EmbeddingProvider | None,
        *,
        reuse_from: list[VectorSet],
        memory: TextMemory,
    ) -> RowPipeline:
        """A pipeline into a set, by the configuration it is built from."""
        return RowPipeline(
            vector_set=vector_set,
            configuration=configuration,
            store=self.store,
            embedder=self.embedder(configuration, provider),
            reuse_from=reuse_from,
            memory=memory,
            patiently=self.patiently,
            as_owner=self.as_owner,
        )

    def embedder(self, configuration: VectorConfiguration, provider: EmbeddingProvider | None) -> PacedEmbedder:
        """The paced embedder of a configuration; opened once for a provider as it is configured now."""
        model, dimensions = configuration.embedding_model, configuration.embedding_dimensions
        name = (
            provider.id if provider else None,
            provider.updated_at if provider else None,
            model,
            dimensions,
        )
        if name not in self._embedders:
            limits = provider.limits if provider else {}
            raw = self._resources.enter_context(
                self._runtime.open_embedder(provider, self._connection, model, dimensions)
            )
            self._embedders[name] = PacedEmbedder(
                raw,
                limits=limits,
                budget=CatalogBudget.from_limits(self._runtime.catalog, provider.id, limits) if provider else None,
                patience_seconds=self._patience_seconds,
                check=self._check,
            )
        return self._embedders[name]

    def embedder_counters(self) -> tuple[int, int]:
        """Requests made to providers, and how many of them were repeats."""
        counters = [embedder.counters for embedder in self._embedders.values()]
        return sum(item.requests for item in counters), sum(item.retries for item in counters)
