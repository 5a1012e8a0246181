"""Answering a query: embed the question with the live set's own model, search the live set."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from embedd_dagster.catalog import vector_tables
from embedd_dagster.catalog.live_tables import LiveTable, ProviderRef
from embedd_dagster.catalog.query_bookings import QueryBookings
from embedd_dagster.catalog.vector_tables import Endpoints
from embedd_dagster.core.filters import Filter, parse_filter
from embedd_dagster.core.rows import Hit, Vectors
from embedd_dagster.core.vector_table import Mode, VectorConfiguration
from embedd_dagster.engine.question import embed_question
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError, NotFound, NotReady, TransientError, VectorStoreRejected
from embedd_dagster.protocols.embedder import Embedder
from embedd_dagster.protocols.store import SearchRequest, Store


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a vector table; `filters` are as in the request's JSON."""

    query: str
    limit: int
    min_similarity_score: float | None = None
    filters: Any = None


@dataclass(slots=True)
class StageSeconds:
    """Where the time of a query went: beside these, all of it is ours."""

    catalog: float = 0.0
    embed: float = 0.0
    search: float = 0.0


@dataclass(frozen=True, slots=True)
class SearchAnswer:
    """Hits, highest similarity first, and the model that the question was embedded with."""

    hits: list[Hit]
    model: str


class SearchObserver(Protocol):
    """Who counts what queries cost; its method is called from several threads."""

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
            if found is not None:
                self._entries[key] = found
                return found
        # not under the lock: opening asks the catalog, and nobody else is to wait for that
        opened = opener()
        with self._lock:
            found = self._entries.setdefault(key, opened)
            # not closed here: another thread may be in the middle of a call; it is closed when the last reference goes
            while len(self._entries) > self._size:
                self._entries.pop(next(iter(self._entries)))
        if found is not opened:
            opened.close()
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
        self._bookings = QueryBookings(runtime.catalog)

    def search(
        self,
        live: LiveTable,
        question: Question,
        *,
        refresh: Callable[[], LiveTable],
        stages: StageSeconds | None = None,
    ) -> SearchAnswer:
        """The nearest rows to a question, among those that the filters match.

        `refresh` finds the table once more. Raises NotReady before the first completed backfill, ValidationFailed for the
        filters, what `refresh` raises, and the transient errors of the provider and the store.
        """
        stages = stages or StageSeconds()
        try:
            return self._search(live, question, stages)
        except (TransientError, VectorStoreRejected):
            # a swap may have dropped the set between the catalog's answer and the store's: once more on what is live now
            with _timed(stages, "catalog"):
                again = refresh()
            if again.vector_set == live.vector_set:
                raise
            return self._search(again, question, stages)

    def _search(self, live: LiveTable, question: Question, stages: StageSeconds) -> SearchAnswer:
        configuration, vector_set = live.configuration, live.vector_set
        if configuration is None or vector_set is None:
            raise NotReady(
                f"Vector table {live.name!r} has no complete set of vectors yet.",
                resolution="Start a backfill with POST /v1/vector-tables/{id}/backfill and wait until it is synced.",
            )
        tree: Filter | None = parse_filter(question.filters, vector_set.filter_types) if question.filters else None
        embedder, store = self._embedder(live, configuration), self._store(live)
        vector = self._embed(embedder, live.provider, question.query, stages)
        with _timed(stages, "search"):
            hits = store.search(
                vector_set,
                SearchRequest(vector, question.limit, question.query, tree, question.min_similarity_score),
            )
        return SearchAnswer(hits, configuration.embedding_model)

    def _embed(self, embedder: Embedder, provider: ProviderRef | None, query: str, stages: StageSeconds) -> Vectors:
        # an estimate: a question's answer does not say what it has cost
        tokens = max(1, len(query.encode(errors="replace")) // 4)
        if provider is not None:
            self._bookings.note(provider.id, provider.limits, tokens)
        kind = provider.kind if provider else "none"
        try:
            with _timed(stages, "embed"):
                vector = embed_question(embedder, query)
        except EmbeddError as error:
            if self._observer is not None:
                self._observer.provider_call(kind, error.code, 0)
            raise
        if self._observer is not None:
            self._observer.provider_call(kind, "ok", tokens)
        return vector

    def _store(self, live: LiveTable) -> Store:
        mode = live.mode
        key = (mode, live.connection_id, live.connection_updated_at) if mode is Mode.PLATFORM else mode
        return self._stores.get(
            key,
            lambda: self._runtime.open_store(
                mode, self._endpoints(live).connection, read_timeout_seconds=self._patience
            ),
        )

    def _embedder(self, live: LiveTable, configuration: VectorConfiguration) -> Embedder:
        provider = live.provider
        model, dimensions = configuration.embedding_model, configuration.embedding_dimensions
        # without a provider the source embeds, by the credentials of its connection
        account = (provider.id, provider.updated_at) if provider else (live.connection_id, live.connection_updated_at)

        def open_embedder() -> Embedder:
            endpoints = self._endpoints(live)
            return self._runtime.open_embedder(
                endpoints.embedding_provider,
                endpoints.connection,
                model,
                dimensions,
                timeout_seconds=self._patience,
                one_text_at_a_time=True,
            )

        return self._embedders.get((*account, model, dimensions), open_embedder)

    def _endpoints(self, live: LiveTable) -> Endpoints:
        """With the secrets: read only where something is opened. At least as new as the instant that it is kept by."""
        with self._runtime.catalog.transaction() as session:
            found = vector_tables.load_endpoints(session, live.id)
        if found is None:
            raise NotFound("vector_table", live.id)
        return found

    def close(self) -> None:
        """Gives every connection back, and books what is still to be booked."""
        self._bookings.close()
        self._stores.close()
        self._embedders.close()


@contextmanager
def _timed(stages: StageSeconds, stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        setattr(stages, stage, getattr(stages, stage) + time.perf_counter() - begun)
