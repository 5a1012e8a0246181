"""Calls for one collection's points, as large as its strict mode allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from embedd_dagster.connectors.qdrant.client import QdrantRest
from embedd_dagster.connectors.qdrant.failures import LimitExceeded
from embedd_dagster.connectors.qdrant.limits import UNLIMITED, CollectionLimits
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.errors import VectorStoreUnavailable

SCROLL_PAGE: Final = 10_000
_LONGEST_WAIT_SECONDS: Final = 60.0
_Result = TypeVar("_Result")


class PointCalls:
    """Calls of one Qdrant. Limits are asked for when a call has been refused, so they cost nothing if there are none."""

    def __init__(self, rest: QdrantRest) -> None:
        self._rest = rest
        self._limits: dict[str, CollectionLimits] = {}
        """Of the collections that have refused a call."""

    def call(self, vector_set: VectorSet, method: str, path: tuple[str, ...], body: Any, **options: Any) -> Any:
        """The result of a call for the points of a set."""
        return self._rest.call(method, ("collections", vector_set.versioned_name, "points", *path), body, **options)

    def scroll(
        self, vector_set: VectorSet, limits: CollectionLimits, where: dict[str, Any] | None, **wanted: Any
    ) -> Iterator[dict[str, Any]]:
        """Every point that matches, page by page; `wanted` says with what."""
        body: dict[str, Any] = {"limit": limits.page(SCROLL_PAGE), **wanted}
        if where:
            body["filter"] = where
        while True:
            page = self.call(vector_set, "POST", ("scroll",), body)
            yield from page["points"]
            if page["next_page_offset"] is None:
                return
            body["offset"] = page["next_page_offset"]

    def in_parts(
        self,
        vector_set: VectorSet,
        part: slice,
        allowed: Callable[[CollectionLimits, int], int],
        call: Callable[[slice], None],
    ) -> None:
        """Calls with the whole part, or with one after another of as many items as the collection's limits allow.

        Between two of them a rate limit is waited for here: to begin the part again would use up each minute in vain.
        """
        start = part.start
        while start < part.stop:
            try:
                start = self.within_limits(vector_set, partial(_call_from, start, part.stop, allowed, call))
            except VectorStoreUnavailable as error:
                if start == part.start or error.retry_after_seconds is None:
                    raise
                time.sleep(min(error.retry_after_seconds, _LONGEST_WAIT_SECONDS))

    def within_limits(self, vector_set: VectorSet, call: Callable[[CollectionLimits], _Result]) -> _Result:
        """What `call` returns. If strict mode refuses it, the collection's limits are read and it is called once more."""
        name = vector_set.versioned_name
        known = self._limits.get(name, UNLIMITED)
        try:
            return call(known)
        except LimitExceeded:
            limits = self.read_limits(vector_set)
            if limits == known:
                raise
        self._limits[name] = limits
        return call(limits)

    def read_limits(self, vector_set: VectorSet) -> CollectionLimits:
        """What the collection allows at present."""
        return CollectionLimits.from_info(self._rest.call("GET", ("collections", vector_set.versioned_name)))

    def forget(self, name: str) -> None:
        """Forgets the limits of a collection that is dropped."""
        self._limits.pop(name, None)


def _call_from(
    start: int,
    stop: int,
    allowed: Callable[[CollectionLimits, int], int],
    call: Callable[[slice], None],
    limits: CollectionLimits,
) -> int:
    """Where the next call begins, after one with as many items from `start` on as are allowed."""
    end = start + allowed(limits, stop - start)
    call(slice(start, end))
    return end
