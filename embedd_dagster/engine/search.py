"""Answering a query: embed the question with the live set's own model, search the live set."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from embedd_dagster.catalog import vector_sets, vector_tables
from embedd_dagster.catalog.vector_tables import LiveTable
from embedd_dagster.core.filters import Filter, parse_filter
from embedd_dagster.core.rows import Hit, Vectors
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.embedders.base import Embedder
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError, NotReady, TransientError, VectorStoreRejected
from embedd_dagster.stores.base import Store


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """Hits, highest similarity first, and the model that the question was embedded with."""

    hits: list[Hit]
    model: str


class SearchObserver(Protocol):
    """Who counts what queries take and cost; its methods are called from several threads."""

    def stage(self, stage: str, seconds: float) -> None:
        """A stage of a query has ended, well or badly: `catalog`, `embed`, `search`, or all of it (`total`)."""
        ...

    def provider_call(self, provider: str, outcome: str, tokens: int) -> None:
        """A question was sent to a provider: `ok` with an estimate of its tokens, or an error's code."""
        ...


class _Closable(Protocol):
    def close(self) -> None: ...


R = TypeVar("R", bound=_Closable)


class _OpenCache(Generic[R]):
    """What is open, by what it was opened for; the oldest beyond `size` is closed once nobody uses it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: dict[object, R] = {}
        self._lock = threading.Lock()

    def get(self, key: object, opener: Callable[[], R]) -> R:
        with self._lock:
            found = self._entries.pop(key, None)
            if found is None:
                found = opener()
            self._entries[key] = found
            # not closed here: another thread may be in the middle of a call; it is closed when the last reference goes
            while len(self._entries) > self._size:
                self._entries.pop(next(iter(self._entries)))
            return found

    def close(self) -> None:
        with self._lock:
            for entry in self._entries.values():
                entry.close()
            self._entries.clear()


class Searcher:
    """Answers queries; keeps stores and embedders open between them. Safe to use from several threads."""

    def __init__(self, runtime: Runtime, *, observer: SearchObserver | None = None) -> None:
        self._runtime = runtime
        self._observer = observer
        self._patience = runtime.settings.request_timeout_seconds
        self._stores: _OpenCache[Store] = _OpenCache(64)
        self._embedders: _OpenCache[Embedder] = _OpenCache(64)

    def search(
        self,
        environment_id: str,
        vector_table_id: str,
        *,
        query: str,
        limit: int,
        min_similarity_score: float | None = None,
        filters: Any = None,
    ) -> SearchAnswer:
        """The nearest rows to a question, among those that the filters (as in the request's JSON) match.

        Raises NotFound, NotReady before the first completed backfill, ValidationFailed for the filters, and the
        transient errors of the provider and the store.
        """
        with self._timed("total"):
            return self._search_live(environment_id, vector_table_id, query, limit, min_similarity_score, filters)

    def _search_live(
        self,
        environment_id: str,
        vector_table_id: str,
        query: str,
        limit: int,
        min_similarity_score: float | None,
        filters: Any,
    ) -> SearchAnswer:
        live = self._load(environment_id, vector_table_id)
        try:
            return self._search(live, query, limit, min_similarity_score, filters)
        except (TransientError, VectorStoreRejected):
            # a swap may have dropped the set between the catalog's answer and the store's: once more on what is live now
            again = self._load(environment_id, vector_table_id)
            if again.vector_table.live_version == live.vector_table.live_version:
                raise
            return self._search(again, query, limit, min_similarity_score, filters)

    def _load(self, environment_id: str, vector_table_id: str) -> LiveTable:
        with self._timed("catalog"), self._runtime.catalog.transaction() as session:
            return vector_tables.load_live(session, environment_id, vector_table_id)

    def _search(
        self, live: LiveTable, query: str, limit: int, min_similarity_score: float | None, filters: Any
    ) -> SearchAnswer:
        if live.live_set is None:
            raise NotReady(
                f"Vector table {live.vector_table.name!r} has no complete set of vectors yet.",
                resolution="Start a backfill with POST /v1/vector-tables/{id}/backfill and wait until it is synced.",
            )
        configuration = VectorConfiguration.from_json(live.live_set.configuration)
        tree: Filter | None = parse_filter(filters, configuration.filter_types) if filters else None
        vector = self._embed(live, configuration, query)
        with self._timed("search"):
            hits = self._store(live).search(
                vector_sets.as_vector_set(live.live_set, live.vector_table.storage_name),
                vector,
                limit=limit,
                min_similarity_score=min_similarity_score,
                filters=tree,
            )
        return SearchAnswer(hits, configuration.embedding_model)

    def _embed(self, live: LiveTable, configuration: VectorConfiguration, query: str) -> Vectors:
        embedder = self._embedder(live, configuration)
        provider = live.embedding_provider.provider if live.embedding_provider else "none"
        try:
            with self._timed("embed"):
                vector = embedder.embed_query(query)
        except EmbeddError as error:
            if self._observer is not None:
                self._observer.provider_call(provider, error.code, 0)
            raise
        if self._observer is not None:
            # an estimate: a question's answer does not say what it has cost
            self._observer.provider_call(provider, "ok", max(1, len(query.encode(errors="replace")) // 4))
        return vector

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            if self._observer is not None:
                self._observer.stage(stage, time.perf_counter() - begun)

    def _store(self, live: LiveTable) -> Store:
        mode = Mode(live.vector_table.mode)
        key = (mode, live.connection.id, live.connection.updated_at) if mode is Mode.PLATFORM else mode
        return self._stores.get(
            key, lambda: self._runtime.open_store(mode, live.connection, read_timeout_seconds=self._patience)
        )

    def _embedder(self, live: LiveTable, configuration: VectorConfiguration) -> Embedder:
        provider = live.embedding_provider
        model, dimensions = configuration.embedding_model, configuration.embedding_dimensions
        key = (provider.id, provider.updated_at, model, dimensions) if provider else (None, model, dimensions)
        return self._embedders.get(
            key, lambda: self._runtime.open_embedder(provider, model, dimensions, timeout_seconds=self._patience)
        )

    def close(self) -> None:
        """Gives every connection back."""
        self._stores.close()
        self._embedders.close()
