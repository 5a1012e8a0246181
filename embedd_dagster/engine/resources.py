"""What a run has open of one connection: its source, its store, and the embedders of its vector tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime

from embedd_dagster.catalog.provider_budgets import CatalogBudget
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.protocols.source import Source
from embedd_dagster.protocols.store import Store


class ConnectionResources:
    """One connection's source and store, and embedders, opened when they are first needed. Used from several threads."""

    def __init__(
        self,
        runtime: Runtime,
        connection: Connection,
        *,
        outage_seconds: float,
        check: Callable[[], None],
        processes: int = 1,
    ) -> None:
        """Embedders wait for a provider that is down for `outage_seconds`; `check` ends a wait by raising.

        An account's concurrency is divided between the `processes` that use it for this run.
        """
        self._runtime = runtime
        self._connection = connection
        self._outage_seconds = outage_seconds
        self._check = check
        self._processes = processes
        self._resources = ExitStack()
        self._embedders: dict[tuple[str | None, datetime | None, str, int], PacedEmbedder] = {}
        self.source: Source = self._resources.enter_context(runtime.open_source(connection))
        self.store: Store = self._resources.enter_context(runtime.open_store(Mode(connection.mode), connection))

    def close(self) -> None:
        """Closes everything that was opened."""
        self._resources.close()

    def embedder(self, configuration: VectorConfiguration, provider: EmbeddingProvider | None) -> PacedEmbedder:
        """The paced embedder of a configuration; opened once per model and per state of the provider."""
        model, dimensions = configuration.embedding_model, configuration.embedding_dimensions
        name = (provider.id if provider else None, provider.updated_at if provider else None, model, dimensions)
        if name not in self._embedders:
            raw = self._resources.enter_context(
                self._runtime.open_embedder(provider, self._connection, model, dimensions)
            )
            limits = dict(provider.limits) if provider else {}
            budget = CatalogBudget.from_limits(self._runtime.catalog, provider.id, limits) if provider else None
            if self._processes > 1:
                concurrency = limits.get("concurrency") or raw.limits.concurrency
                limits["concurrency"] = max(1, concurrency // self._processes)
            self._embedders[name] = PacedEmbedder(
                raw, limits=limits, budget=budget, patience_seconds=self._outage_seconds, check=self._check
            )
        return self._embedders[name]

    def embedder_counters(self) -> tuple[int, int]:
        """Requests made to providers, and how many of them were repeats."""
        counters = [embedder.counters for embedder in self._embedders.values()]
        return sum(item.requests for item in counters), sum(item.retries for item in counters)
