"""Searching a collection: the nearest points among exactly those that match."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import orjson

from embedd_dagster.connectors.qdrant.calls import SCROLL_PAGE, PointCalls
from embedd_dagster.connectors.qdrant.filters import compile_filter
from embedd_dagster.connectors.qdrant.limits import CollectionLimits
from embedd_dagster.core.filters import Filter
from embedd_dagster.core.rows import Vectors, VectorSet

_HNSW_EF: Final = 128
_ACORN: Final = {"enable": True, "max_selectivity": 0.7}
"""Under a filter, the walk of the graph looks behind points that do not match; by default it would only below 0.4."""
_SHOWN: Final = ["pk", "embedded_text", "metadata"]
_SCAN_PAGE: Final = 1_000
_MOST_SCANNED: Final = 20_000
"""Points that are compared here if a search finds too few and an exact one is not allowed."""


def nearest(
    calls: PointCalls,
    vector_set: VectorSet,
    vector: Vectors,
    limit: int,
    filters: Filter | None,
    limits: CollectionLimits,
) -> list[Any]:
    """The nearest points, fewer than `limit` only if there are no more."""
    types, longest = vector_set.filter_types, limits.condition_max_size
    where = compile_filter(filters, types, max_list_values=longest) if filters is not None else {}
    asked = limit
    exact = False
    while True:
        body = {
            "query": np.ascontiguousarray(vector, dtype=np.float32),
            "limit": asked,
            "filter": where,
            "params": {"exact": exact, "hnsw_ef": limits.hnsw_ef(max(_HNSW_EF, 2 * asked)), "acorn": _ACORN},
            "with_payload": _SHOWN,
        }
        content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        points: list[Any] = calls.call(vector_set, "POST", ("query",), content)["points"]
        # A walk of the graph under a filter may end early: only an exact search knows that there is no more.
        complete = exact or len(points) >= asked
        if not complete and not limits.allows_exact:
            return _nearest_by_scroll(calls, vector_set, vector, limit, where, limits) or points
        zeros = _zero_vectors(calls, vector_set, points) if complete else set()
        if complete and (len(points) - len(zeros) >= limit or len(points) < asked):
            return [point for point in points if point["id"] not in zeros]
        exact = exact or not complete
        asked = limit + 2 * len(zeros)


def _nearest_by_scroll(
    calls: PointCalls,
    vector_set: VectorSet,
    vector: Vectors,
    limit: int,
    where: dict[str, Any],
    limits: CollectionLimits,
) -> list[Any]:
    """The nearest of the points that match, compared here; [] if too many match to be read."""
    direction = vector / np.linalg.norm(vector)
    best: list[dict[str, Any]] = []
    page = min(limits.page(SCROLL_PAGE), _SCAN_PAGE)
    points = calls.scroll(vector_set, limits, where, limit=page, with_payload=_SHOWN, with_vector=True)
    for seen, point in enumerate(points, start=1):
        if seen > _MOST_SCANNED:
            return []
        stored = np.asarray(point.pop("vector"), dtype=np.float32)
        if stored.any():
            best.append({**point, "score": float(direction @ stored)})
        if len(best) >= page + limit:
            best = _highest(best, limit)
    return _highest(best, limit)


def _zero_vectors(calls: PointCalls, vector_set: VectorSet, points: list[Any]) -> set[str]:
    """Those of the found points whose vector is all zeros: Qdrant gives them the similarity 0."""
    ids = [point["id"] for point in points if point["score"] == 0]
    if not ids:
        return set()
    body = {"ids": ids, "with_payload": False, "with_vector": True}
    return {point["id"] for point in calls.call(vector_set, "POST", (), body) if not any(point["vector"])}


def _highest(points: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    return sorted(points, key=lambda point: -point["score"])[:limit]
