"""What Prometheus reads at `/metrics`: what this process has served, and the state of the catalog.

Labels are route templates, methods, statuses, stages and kinds: never an id, a name or anything that a caller has sent.
So they need no key, and their number is bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedd_dagster.catalog import statistics
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.statistics import Statistics
from embedd_dagster.engine.search import StageSeconds
from embedd_dagster.errors import CatalogUnavailable

_METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_KEPT_SECONDS: Final = 10.0
_log = structlog.get_logger("embedd.api")


class Metrics:
    """Counters of one application. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, *, kept_seconds: float = _KEPT_SECONDS) -> None:
        """`kept_seconds`: the catalog is not asked more often than this, however often somebody scrapes."""
        self._registry = CollectorRegistry()
        self._registry.register(_CatalogCollector(catalog, kept_seconds))
        self._requests = Counter(
            "embedd_http_requests",
            "Requests answered, by route template.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "embedd_http_request_duration_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stage_seconds = Histogram(
            "embedd_query_stage_duration_seconds",
            "Queries: time in `catalog`, `embed`, `search`, and in all (`total`).",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = {stage: self._stage_seconds.labels(stage) for stage in ("catalog", "embed", "search", "total")}
        self._provider_calls = Counter(
            "embedd_provider_calls",
            "Questions sent to embedding providers by this process; outcome is `ok` or an error's code.",
            ("provider", "outcome"),
            registry=self._registry,
        )
        self._provider_tokens = Counter(
            "embedd_provider_tokens",
            "Tokens of the questions that were embedded, estimated.",
            ("provider",),
            registry=self._registry,
        )

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Counts an answer. `route` is the template; None where none fits."""
        method, route = (method if method in _METHODS else "other"), route or "unmatched"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def query(self, stages: StageSeconds, total_seconds: float) -> None:
        """Counts a query, as far as it came."""
        for stage in ("catalog", "embed", "search"):
            if seconds := getattr(stages, stage):
                self._stages[stage].observe(seconds)
        self._stages["total"].observe(total_seconds)

    def provider_call(self, provider: str, outcome: str, tokens: int) -> None:
        """Counts a question sent to a provider."""
        self._provider_calls.labels(provider, outcome).inc()
        if tokens:
            self._provider_tokens.labels(provider).inc(tokens)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _CatalogCollector(Collector):
    """The state of the catalog. While that is down, only `embedd_catalog_up 0` is told: old numbers would lie."""

    def __init__(self, catalog: Catalog, kept_seconds: float) -> None:
        self._catalog = catalog
        self._kept_seconds = kept_seconds
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._last: Statistics | None = None

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks no catalog."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Gauges as of the last look."""
        with self._lock:  # one look at a time: the others wait for it and take its outcome
            if time.monotonic() - self._read_at >= self._kept_seconds:
                self._last = self._read()
                self._read_at = time.monotonic()
            found = self._last
        yield GaugeMetricFamily("embedd_catalog_up", "Whether the catalog answers.", value=int(found is not None))
        if found is not None:
            yield from _families(found)

    def _read(self) -> Statistics | None:
        try:
            with self._catalog.transaction() as session:
                return statistics.read(session)
        except CatalogUnavailable:
            return None
        except Exception as error:  # noqa: BLE001 - the other numbers are still worth telling
            _log.warning("catalog not measured", kind=type(error).__name__)
            return None


def _families(found: Statistics) -> Iterator[Metric]:
    tables = GaugeMetricFamily("embedd_vector_tables", "Vector tables by sync_status.", labels=["sync_status"])
    for status, number in found.vector_tables.items():
        tables.add_metric([status], number)
    yield tables
    live = GaugeMetricFamily("embedd_tasks_live", "Tasks that are pending or running.", labels=["task_type", "status"])
    for (task_type, status), number in found.live_tasks.items():
        live.add_metric([task_type, status], number)
    yield live
    lag = GaugeMetricFamily(
        "embedd_sync_staleness_seconds",
        "Seconds since the last sync, over live vector tables that are not paused: quantile 1 is the stalest.",
        labels=["quantile"],
    )
    for quantile, seconds in found.staleness_seconds.items():
        lag.add_metric([quantile], seconds)
    yield lag
    yield GaugeMetricFamily(
        "embedd_change_log_lag_bytes",
        "How much of its log a source keeps for changes that are not applied: of the source that keeps most.",
        value=found.log_lag_bytes,
    )
    yield GaugeMetricFamily(
        "embedd_changes_pending", "Captured changes that are not applied yet.", value=found.changes_pending
    )
    failed = GaugeMetricFamily("embedd_failed_rows", "Rows of live sets that have no vector, by step.", labels=["step"])
    for step, number in found.failed_rows.items():
        failed.add_metric([step], number)
    yield failed
    yield from _ended(found)


def _ended(found: Statistics) -> Iterator[Metric]:
    window = "of tasks that were made in the last 24 hours and have ended"
    ended = GaugeMetricFamily("embedd_tasks_ended", f"The number {window}.", labels=["task_type", "status"])
    rows = GaugeMetricFamily("embedd_tasks_ended_rows", f"Rows {window}.", labels=["task_type", "status", "outcome"])
    tokens = GaugeMetricFamily("embedd_tasks_ended_tokens", f"Tokens {window}.", labels=["task_type", "status"])
    for (task_type, status), sums in found.ended_tasks.items():
        ended.add_metric([task_type, status], sums.tasks)
        rows.add_metric([task_type, status, "processed"], sums.rows_processed - sums.rows_failed)
        rows.add_metric([task_type, status, "failed"], sums.rows_failed)
        tokens.add_metric([task_type, status], sums.tokens)
    yield from (ended, rows, tokens)
