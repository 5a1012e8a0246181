"""The metrics at `/metrics`, for Prometheus: what this process has served, and the state of the catalog.

Labels are route templates, methods, statuses, stages and kinds, never an id, a name or anything else from a request. So the
page needs no key, and the number of time series is bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

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
_CACHE_SECONDS: Final = 10.0
_ENDED: Final = "the tasks that were created in the last 24 hours and have ended"
_log = structlog.get_logger("embedd.api")


class MetricSpec(NamedTuple):
    """The name of a metric as Prometheus shows it, its type, its meaning and its labels."""

    name: str
    type: str
    description: str
    labels: tuple[str, ...] = ()


METRICS: Final = {
    spec.name: spec
    for spec in (
        MetricSpec(
            "embedd_http_requests_total", "counter", "Requests, by route template.", ("method", "route", "status")
        ),
        MetricSpec(
            "embedd_http_request_duration_seconds",
            "histogram",
            "Time from the arrival of a request to the end of its response.",
            ("method", "route"),
        ),
        MetricSpec(
            "embedd_query_stage_duration_seconds",
            "histogram",
            "Time that queries spend in `catalog`, `embed` and `search`, and in all (`total`).",
            ("stage",),
        ),
        MetricSpec(
            "embedd_provider_calls_total",
            "counter",
            "Questions that this process sent to embedding providers; outcome is `ok` or an error code.",
            ("provider", "outcome"),
        ),
        MetricSpec(
            "embedd_provider_tokens_total", "counter", "Tokens of the embedded questions, estimated.", ("provider",)
        ),
        MetricSpec(
            "embedd_catalog_up",
            "gauge",
            "Whether the catalog answers: 1 or 0. If it is 0, the metrics below are missing.",
        ),
        MetricSpec("embedd_vector_tables", "gauge", "Vector tables by sync_status.", ("sync_status",)),
        MetricSpec("embedd_tasks_live", "gauge", "Tasks that are pending or running.", ("task_type", "status")),
        MetricSpec(
            "embedd_sync_staleness_seconds",
            "gauge",
            "Seconds since the last sync, over live vector tables that are not paused: quantile 1 is the longest.",
            ("quantile",),
        ),
        MetricSpec(
            "embedd_change_log_lag_bytes",
            "gauge",
            "Log that a source keeps because its changes are not applied yet: of the source that keeps most.",
        ),
        MetricSpec("embedd_changes_pending", "gauge", "Changes that were read and are not applied yet."),
        MetricSpec("embedd_failed_rows", "gauge", "Rows of live sets that have no vector, by step.", ("step",)),
        MetricSpec("embedd_tasks_ended", "gauge", f"Number of {_ENDED}.", ("task_type", "status")),
        MetricSpec("embedd_tasks_ended_rows", "gauge", f"Rows of {_ENDED}.", ("task_type", "status", "outcome")),
        MetricSpec("embedd_tasks_ended_tokens", "gauge", f"Tokens of {_ENDED}.", ("task_type", "status")),
    )
}
"""All metrics. `docs/reference/metrics.md` is generated from them."""


class Metrics:
    """The metrics of one application. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, *, cache_seconds: float = _CACHE_SECONDS) -> None:
        """However often the metrics are read, the catalog is read once per `cache_seconds`."""
        self._registry = CollectorRegistry()
        self._registry.register(_CatalogCollector(catalog, cache_seconds))
        self._requests = self._counter("embedd_http_requests_total")
        self._request_seconds = self._histogram("embedd_http_request_duration_seconds")
        stage_seconds = self._histogram("embedd_query_stage_duration_seconds")
        self._stages = {stage: stage_seconds.labels(stage) for stage in ("catalog", "embed", "search", "total")}
        self._provider_calls = self._counter("embedd_provider_calls_total")
        self._provider_tokens = self._counter("embedd_provider_tokens_total")

    def _counter(self, name: str) -> Counter:
        return Counter(name, METRICS[name].description, METRICS[name].labels, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        spec = METRICS[name]
        return Histogram(name, spec.description, spec.labels, buckets=_SECONDS, registry=self._registry)

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Counts a request. `route` is the template of its path; None if no route matches."""
        method, route = (method if method in _METHODS else "other"), route or "unmatched"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def query(self, stages: StageSeconds, total_seconds: float) -> None:
        """Counts a query, with the stages that it reached."""
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
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _CatalogCollector(Collector):
    """The state of the catalog. While it is down, only `embedd_catalog_up 0` is reported: old numbers would mislead."""

    def __init__(self, catalog: Catalog, cache_seconds: float) -> None:
        self._catalog = catalog
        self._cache_seconds = cache_seconds
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._last: Statistics | None = None

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the catalog."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Gauges, at most `cache_seconds` old."""
        with self._lock:  # one read at a time: the others wait for its result
            if time.monotonic() - self._read_at >= self._cache_seconds:
                self._last = self._read()
                self._read_at = time.monotonic()
            found = self._last
        yield _gauge("embedd_catalog_up", [((), int(found is not None))])
        if found is not None:
            yield from _gauges(found)

    def _read(self) -> Statistics | None:
        try:
            with self._catalog.transaction() as session:
                return statistics.read(session)
        except CatalogUnavailable:
            return None
        except Exception as error:  # noqa: BLE001 - the other metrics are still worth reporting
            _log.warning("catalog metrics failed", kind=type(error).__name__)
            return None


def _gauge(name: str, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """The gauge with these samples: the values of its labels, and the value."""
    family = GaugeMetricFamily(name, METRICS[name].description, labels=METRICS[name].labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _gauges(found: Statistics) -> Iterator[Metric]:
    yield _gauge("embedd_vector_tables", (([status], number) for status, number in found.vector_tables.items()))
    yield _gauge("embedd_tasks_live", found.live_tasks.items())
    yield _gauge("embedd_sync_staleness_seconds", (([q], seconds) for q, seconds in found.staleness_seconds.items()))
    yield _gauge("embedd_change_log_lag_bytes", [((), found.log_lag_bytes)])
    yield _gauge("embedd_changes_pending", [((), found.changes_pending)])
    yield _gauge("embedd_failed_rows", (([step], number) for step, number in found.failed_rows.items()))
    ended = found.ended_tasks.items()
    yield _gauge("embedd_tasks_ended", ((kind, sums.tasks) for kind, sums in ended))
    processed = (((*kind, "processed"), sums.rows_processed - sums.rows_failed) for kind, sums in ended)
    failed = (((*kind, "failed"), sums.rows_failed) for kind, sums in ended)
    yield _gauge("embedd_tasks_ended_rows", (*processed, *failed))
    yield _gauge("embedd_tasks_ended_tokens", ((kind, sums.tokens) for kind, sums in ended))
