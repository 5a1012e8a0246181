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
from .metrics import Metrics
from .rate_limit import RateLimiter

_ESTIMATE_SECONDS: Final = 0.04  # a backfill is acknowledged within a tenth of a second
_QUERY_THREADS: Final = 64


@dataclass(slots=True)
class QueriesUnderWay:
    """So many queries are answered at once, each in a thread; the other endpoints have threads of their own."""

    threads: CapacityLimiter
    number: int = 0
    """Answered and waiting; changed in the event loop alone."""


@dataclass(slots=True)
class OutsideRequests:
    """Requests at this moment that wait for somebody else's system; see `api/external_calls.py`."""

    number: int = 0
    """Changed in the event loop alone."""


@dataclass(frozen=True, slots=True)
class ApiState:
    """Settings, access to everything, and what works behind the requests."""

    settings: Settings
    runtime: Runtime
    searcher: Searcher
    launcher: Launcher
    rate_limiter: RateLimiter
    metrics: Metrics
    queries: QueriesUnderWay
    outside: OutsideRequests = field(default_factory=OutsideRequests)
    _estimators: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "estimate"))

    @classmethod
    def open(cls, settings: Settings) -> ApiState:
        """Everything that a request may need; nothing is connected to before it is used."""
        runtime = Runtime.open(settings)
        metrics = Metrics(runtime.catalog)
        return cls(
            settings=settings,
            runtime=runtime,
            searcher=Searcher(runtime, observer=metrics),
            launcher=Launcher(runtime.catalog, settings.dagster_url, settings.dagster_token),
            rate_limiter=RateLimiter.open(settings),
            metrics=metrics,
            queries=QueriesUnderWay(CapacityLimiter(_QUERY_THREADS)),
        )

    def estimate_rows(self, connection: Connection, source_table: str) -> int:
        """The source's estimate of a table's rows, 0 where it does not give one at once: the run will know soon."""
        # in the request's context, so that a source that hangs gets its thread back as well
        waiting: Future[int | None] = self._estimators.submit(
            copy_context().run, validation.estimate_rows, self.runtime, connection, source_table
        )
        try:
            return max(0, waiting.result(_ESTIMATE_SECONDS) or 0)
        except (EmbeddError, NotInTime):
            waiting.cancel()
            return 0

    def close(self) -> None:
        """Gives everything back."""
        self._estimators.shutdown(wait=False, cancel_futures=True)
        self.launcher.close()
        self.searcher.close()
        self.runtime.close()
