"""What lives as long as the application: opened once, shared by all requests."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Final

from anyio import CapacityLimiter

from embedd_dagster.catalog.tables import Connection
from embedd_dagster.engine import validation
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.search import Searcher
from embedd_dagster.errors import EmbeddError
from embedd_dagster.settings import Settings

from .launch import Launcher
from .limits import ConcurrencyLimit, ServerBusy, TooManyQueries
from .metrics import Metrics
from .rate_limit import RateLimiter

_ESTIMATE_SECONDS: Final = 0.04  # the request for a backfill is answered within 100 ms
_QUERY_THREADS: Final = 64
_WAITING_QUERIES: Final = 256
_EXTERNAL_CALLS: Final = 24  # of the 40 threads for all endpoints except queries


@dataclass(frozen=True, slots=True)
class ApiState:
    """The settings, the clients of all other systems, and the limits of this process."""

    settings: Settings
    runtime: Runtime
    searcher: Searcher
    launcher: Launcher
    rate_limiter: RateLimiter
    metrics: Metrics
    query_threads: CapacityLimiter
    """Queries have threads of their own: those that wait for a slow provider delay only each other."""
    queries: ConcurrencyLimit
    """Queries that run or wait for a thread."""
    external_calls: ConcurrencyLimit
    """Other requests that wait for a source, a store or a provider."""
    estimate_seconds: float = _ESTIMATE_SECONDS
    _estimators: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "estimate"))

    @classmethod
    def open(cls, settings: Settings) -> ApiState:
        """Everything that a request may need. Connections are opened when they are first used."""
        runtime = Runtime.open(settings)
        metrics = Metrics(runtime.catalog)
        return cls(
            settings=settings,
            runtime=runtime,
            searcher=Searcher(runtime, observer=metrics),
            launcher=Launcher(runtime.catalog, settings.dagster_url, settings.dagster_token),
            rate_limiter=RateLimiter.open(settings),
            metrics=metrics,
            query_threads=CapacityLimiter(_QUERY_THREADS),
            queries=ConcurrencyLimit(
                _QUERY_THREADS + _WAITING_QUERIES, TooManyQueries, "Too many queries are in progress."
            ),
            external_calls=ConcurrencyLimit(
                _EXTERNAL_CALLS, ServerBusy, "Too many requests wait for databases and providers."
            ),
        )

    def estimate_rows(self, connection: Connection, source_table: str) -> int:
        """The source's estimate of a table's rows; 0 if it does not answer within `estimate_seconds`."""
        # the context of the request has its deadline, which ends the call to a source that hangs
        waiting: Future[int | None] = self._estimators.submit(
            copy_context().run, validation.estimate_rows, self.runtime, connection, source_table
        )
        try:
            return max(0, waiting.result(self.estimate_seconds) or 0)
        except (EmbeddError, NotInTime):
            waiting.cancel()
            return 0

    def close(self) -> None:
        """Closes everything."""
        self._estimators.shutdown(wait=False, cancel_futures=True)
        self.launcher.close()
        self.searcher.close()
        self.runtime.close()
