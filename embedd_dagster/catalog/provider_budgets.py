"""The limits of an account per minute, counted in the catalog for all runs and processes that use the provider.

There is one row per provider and kind (requests, tokens), a leaky bucket: `level` is what is booked and not yet paid off at
`updated_at` by the database's clock. It drains at the rate of the limit. Only the database's clock counts, and a limit may
be edited during runs. A process books more than one request, by its recent use, up to one second's worth, and has one
second to use it. This costs about one short transaction per second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final, Self

from sqlalchemy import ColumnElement, Double, cast, extract, func
from sqlalchemy.dialects.postgresql import TIMESTAMP, insert
from sqlalchemy.orm import Session

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.tables import ProviderBudget
from embedd_dagster.errors import CatalogUnavailable, EmbeddingRateLimited

_BURST_SECONDS: Final = 1.0
_LEASE_SECONDS: Final = 1.0
_RETRY_AFTER_SECONDS: Final = 1.0
# always in this order: processes that book both lock the rows in the same order
_KINDS: Final = ("requests", "tokens")


def _database_clock() -> ColumnElement[datetime]:
    return func.clock_timestamp(type_=TIMESTAMP(timezone=True))


class CatalogBudget:
    """One provider's budget in this process. Safe to use from several threads; any number of budgets may share an account.

    Any minute stays within 2/60 of the limit: the burst of one second, and what was booked one second earlier and is used
    within it. A request above one second's worth goes out once everything before it is paid off.
    """

    def __init__(
        self,
        catalog: Catalog,
        embedding_provider_id: str,
        limits_per_minute: Mapping[str, int],
        *,
        clock: Callable[[], float] = time.monotonic,
        database_clock: Callable[[], ColumnElement[datetime]] = _database_clock,
    ) -> None:
        self._catalog = catalog
        self._embedding_provider_id = embedding_provider_id
        self._rates = {kind: limits_per_minute[kind] / 60 for kind in _KINDS if limits_per_minute.get(kind)}
        self._clock = clock
        self._database_clock = database_clock
        self._lock = threading.Lock()
        self._left = dict.fromkeys(self._rates, 0.0)
        self._used = dict.fromkeys(self._rates, 0.0)
        self._begins_at = self._ends_at = float("-inf")

    @classmethod
    def from_limits(cls, catalog: Catalog, embedding_provider_id: str, limits: Mapping[str, int | None]) -> Self | None:
        """The budget for a provider's `limits`, or None if they have no number per minute."""
        wanted = {kind: limits.get(f"{kind}_per_minute") for kind in _KINDS}
        given = {kind: number for kind, number in wanted.items() if number}
        return cls(catalog, embedding_provider_id, given) if given else None

    def acquire(self, requests: int, tokens: int) -> float:
        """Seconds to wait before a request of this size is sent; it is booked.

        Raises EmbeddingRateLimited while the catalog does not answer: a request that cannot be counted is not sent.
        """
        size = {"requests": float(requests), "tokens": float(tokens)}
        with self._lock:
            is_over = self._clock() >= self._ends_at
            if is_over or any(self._left[kind] < size[kind] for kind in self._rates):
                self._lease(size, is_over=is_over)
            for kind in self._rates:
                self._left[kind] -= size[kind]
                self._used[kind] += size[kind]
            return max(0.0, self._begins_at - self._clock())

    def _lease(self, size: Mapping[str, float], *, is_over: bool) -> None:
        """Books what this request lacks, and in addition as much as was used recently."""
        if is_over:
            # unused in its second: lost, because a process that resumes after a pause would send a burst
            self._left = dict.fromkeys(self._rates, 0.0)
        units = {}
        for kind, rate in self._rates.items():
            # used up before its end: twice as much next time
            wanted = min(self._used[kind] * (1 if is_over else 2), rate * _LEASE_SECONDS)
            units[kind] = max(0.0, max(size[kind], wanted) - self._left[kind])
        try:
            with self._catalog.transaction() as session:
                waits = [self._book(session, kind, units[kind]) for kind in self._rates]
        except CatalogUnavailable as error:
            raise EmbeddingRateLimited(
                "The catalog, which counts this embedding provider's requests and tokens, does not answer.",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
                resolution=error.resolution,
            ) from None
        self._begins_at = max(self._begins_at, self._clock() + max(waits))
        self._ends_at = max(self._begins_at, self._clock()) + _LEASE_SECONDS
        for kind in self._rates:
            self._left[kind] += units[kind]
        self._used = dict.fromkeys(self._rates, 0.0)

    def _book(self, session: Session, kind: str, units: float) -> float:
        """Seconds until the bucket has room for these units, or is empty if they exceed its size."""
        rate = self._rates[kind]
        level = _add(session, self._embedding_provider_id, kind, units, rate, self._database_clock())
        return (level - units + min(units, rate * _BURST_SECONDS)) / rate - _BURST_SECONDS


def book_used(
    catalog: Catalog, embedding_provider_id: str, limits: Mapping[str, int | None], requests: int, tokens: int
) -> None:
    """Books what queries, which do not wait, have used already. Raises CatalogUnavailable.

    The bucket is never filled beyond one minute's worth: the provider does not count more either, and runs must resume soon
    after queries have used up the limit for hours.
    """
    used = {"requests": float(requests), "tokens": float(tokens)}
    with catalog.transaction() as session:
        for kind in _KINDS:
            if limit := limits.get(f"{kind}_per_minute"):
                _add(session, embedding_provider_id, kind, used[kind], limit / 60, _database_clock(), most=float(limit))


def _add(
    session: Session,
    embedding_provider_id: str,
    kind: str,
    units: float,
    rate: float,
    now: ColumnElement[datetime],
    *,
    most: float | None = None,
) -> float:
    """The bucket's new level: what has not drained at this rate, plus these units. They do not lift it above `most`."""
    table = ProviderBudget
    elapsed = func.greatest(0.0, cast(extract("epoch", now - table.updated_at), Double))
    left = func.greatest(0.0, table.level - rate * elapsed)
    level = units if most is None else min(units, most)
    statement = insert(table).values(
        embedding_provider_id=embedding_provider_id, kind=kind, level=level, updated_at=now
    )
    statement = statement.on_conflict_do_update(
        index_elements=[table.embedding_provider_id, table.kind],
        set_={
            "level": left + units if most is None else func.greatest(left, func.least(left + units, most)),
            "updated_at": func.greatest(now, table.updated_at),
        },
    )
    booked: float = session.execute(statement.returning(table.level)).scalar_one()
    return booked
