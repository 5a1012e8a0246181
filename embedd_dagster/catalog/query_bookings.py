"""Queries count against a provider's limits per minute, but never wait for them.

A user waits for a query, nobody waits for a backfill. So the use of queries is booked afterwards, summed up over one
second, and runs that share the account (`CatalogBudget`) have that much less left. A query costs the catalog nothing. A
process that answers queries costs it one short transaction per second for each provider that has such limits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

import structlog

from embedd_dagster.catalog import provider_budgets
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.errors import CatalogUnavailable

_SECONDS_BETWEEN: Final = 1.0
_log = structlog.get_logger("embedd.catalog")


class QueryBookings:
    """The use of this process' queries that is not booked yet. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, *, seconds_between: float = _SECONDS_BETWEEN) -> None:
        self._catalog = catalog
        self._seconds_between = seconds_between
        self._lock = threading.Lock()
        self._used: dict[str, tuple[Mapping[str, Any], int, int]] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, embedding_provider_id: str, limits: Mapping[str, Any], tokens: int) -> None:
        """Records a query of this many tokens to this provider; does nothing if its limits have no number per minute."""
        if not (limits.get("requests_per_minute") or limits.get("tokens_per_minute")):
            return
        with self._lock:
            _, requests, before = self._used.get(embedding_provider_id, (limits, 0, 0))
            self._used[embedding_provider_id] = (limits, requests + 1, before + tokens)
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._work, name="query-bookings", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._closing.wait(self._seconds_between):
            self.book()

    def book(self) -> None:
        """Books what was recorded so far. What cannot be booked now is booked next time."""
        with self._lock:
            used, self._used = self._used, {}
        for embedding_provider_id, (limits, requests, tokens) in used.items():
            try:
                provider_budgets.book_used(self._catalog, embedding_provider_id, limits, requests, tokens)
            except CatalogUnavailable:
                self._put_back(embedding_provider_id, limits, requests, tokens)
            except Exception as error:  # noqa: BLE001 - a provider that was just deleted must not stop the others
                _log.warning("queries not booked", embedding_provider=embedding_provider_id, kind=type(error).__name__)

    def _put_back(self, embedding_provider_id: str, limits: Mapping[str, Any], requests: int, tokens: int) -> None:
        with self._lock:
            newer, more_requests, more_tokens = self._used.get(embedding_provider_id, (limits, 0, 0))
            self._used[embedding_provider_id] = (newer, requests + more_requests, tokens + more_tokens)

    def close(self) -> None:
        """Books what is left. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.book()
