"""Waiting until Qdrant has built the index of a loaded collection."""

from __future__ import annotations

import time
from typing import Any, Final

import structlog
from qdrant_client import models

from embedd_dagster.connectors.qdrant.client import WRITE_SECONDS, QdrantRest
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import ReportIndexed, ignore_report

INDEXING_THRESHOLD_KB: Final = 20_000  # Qdrant's own default was this for years; smaller segments are scanned fast
_POLL_SECONDS: Final = 0.2
_GREEN_POLLS: Final = 3
_RED_POLLS: Final = 25
_STALLED_SECONDS: Final = 900.0
_log = structlog.get_logger(__name__)


def wait_for_index(rest: QdrantRest, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
    """Turns indexing on and returns when the collection stays green, or its index is complete.

    A collection that is yellow is being indexed, however long nothing about it changes: the build of one large segment shows
    no step. Idempotent: a build that is running is left alone. Each time that Qdrant is asked, `report` takes what is indexed;
    what it raises ends the wait.

    Raises:
        VectorStoreRejected: Qdrant could not build the index; the message says why.
        VectorStoreUnavailable: The collection is neither being indexed nor ready, and stays so.
    """
    path = ("collections", vector_set.versioned_name)
    body = models.UpdateCollection(
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=INDEXING_THRESHOLD_KB)
    )
    if _threshold(rest.call("GET", path)) != INDEXING_THRESHOLD_KB:
        # never for nothing: it cancels a build that is running
        rest.call("PATCH", path, body, seconds=WRITE_SECONDS)
    green_count = red_count = 0
    state: Any = None
    moved_at = time.monotonic()
    while True:
        info = rest.call("GET", path)
        status = info["status"]
        report(info.get("indexed_vectors_count") or 0, info.get("points_count") or 0)
        # Right after the switch a real server may say green before its optimizer has looked.
        green_count = green_count + 1 if status == "green" else 0
        if green_count >= (_GREEN_POLLS if _kilobytes(info, vector_set) >= INDEXING_THRESHOLD_KB else 1):
            return
        red_count = red_count + 1 if status == "red" else 0
        if red_count and _is_indexed(info, vector_set):
            _log.warning("Qdrant keeps an error of an earlier build", collection=path[1], error=_optimizer_error(info))
            return
        if red_count >= _RED_POLLS:
            raise _failed(vector_set, info)
        if status == "grey" or red_count == 1:  # optimizations wait for a nudge; since 1.18 it clears an error, too
            rest.call("PATCH", path, body, seconds=WRITE_SECONDS)
        now = (status, info.get("indexed_vectors_count"), info.get("segments_count"))
        if now != state or status in ("green", "yellow"):
            state, moved_at = now, time.monotonic()
        elif time.monotonic() - moved_at > _STALLED_SECONDS:
            raise VectorStoreUnavailable(
                f"Qdrant does not index collection {path[1]}: it has been {status} for {_STALLED_SECONDS / 60:.0f} minutes."
            )
        time.sleep(_POLL_SECONDS)


def _failed(vector_set: VectorSet, info: dict[str, Any]) -> VectorStoreRejected:
    return VectorStoreRejected(
        f"Qdrant could not index collection {vector_set.versioned_name}: {_optimizer_error(info)}",
        resolution="Correct the cause (for example, free disk space) and restart Qdrant, which before version 1.18 keeps "
        "the error until then. Then start the backfill again: it goes on with the index.",
    )


def _optimizer_error(info: dict[str, Any]) -> str:
    status = info.get("optimizer_status")
    error = status.get("error") if isinstance(status, dict) else None
    return str(error or "it gives no reason; look at its log.")


def _threshold(info: dict[str, Any]) -> int | None:
    threshold: int | None = info.get("config", {}).get("optimizer_config", {}).get("indexing_threshold")
    return threshold


def _kilobytes(info: dict[str, Any], vector_set: VectorSet) -> float:
    return (info.get("points_count") or 0) * vector_set.dimensions * 4 / 1024


def _is_indexed(info: dict[str, Any], vector_set: VectorSet) -> bool:
    """Whether fewer vectors are without index than an index is built for."""
    missing = (info.get("points_count") or 0) - (info.get("indexed_vectors_count") or 0)
    return missing * vector_set.dimensions * 4 / 1024 < INDEXING_THRESHOLD_KB
