"""Vectors in Qdrant: a collection a set, an alias for the public name."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import httpx
import numpy as np
import orjson

from embedd_dagster.core.embedded_text import text_hash
from embedd_dagster.core.filters import Filter
from embedd_dagster.core.floats import kept_float
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, Hit, PointBatch, Vectors, VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.stores.base import ReportIndexed, ignore_report
from embedd_dagster.stores.qdrant_filters import (
    bucket_filter,
    column_name,
    compile_filter,
    payload_indexes,
)
from embedd_dagster.stores.qdrant_points import point_uuid, read_key, split_batch, upsert_body
from embedd_dagster.stores.qdrant_rest import READ_SECONDS, SLOW_SECONDS, WRITE_SECONDS, QdrantRest, SetMissing
from embedd_dagster.stores.ranking import bucket_ranges, rank

_INDEXING_THRESHOLD_KB: Final = 20_000  # Qdrant's own default was this for years; smaller segments are scanned fast
_SCROLL_PAGE: Final = 10_000
_IDS_PER_CALL: Final = 1_000
_RANGES_PER_FILTER: Final = 64
_HNSW_EF: Final = 128
_ACORN: Final = {"enable": True, "max_selectivity": 0.7}
"""Under a filter, the walk of the graph looks behind points that do not match; by default it would only below 0.4."""
_POLL_SECONDS: Final = 0.2
_GREEN_POLLS: Final = 3
_STALLED_SECONDS: Final = 900.0


class QdrantStore:
    """An open Qdrant, by its REST interface. Safe to use from several threads.

    Collections use cosine: Qdrant stores vectors normalised, and `vectors` returns them so. To reuse one is to store the
    same direction again. A vector of zeros has no direction: it is stored and counted, and never found.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        read_timeout_seconds: float | None = None,
    ) -> None:
        self._rest = QdrantRest(url, api_key, transport, read_timeout_seconds=read_timeout_seconds or READ_SECONDS)

    def check(self) -> None:
        """Returns when Qdrant answers to this key."""
        self._rest.call("GET", ("collections",))

    def create(self, vector_set: VectorSet) -> None:
        """A collection that is not indexed while it is loaded; one that is there is kept."""
        name = vector_set.versioned_name
        if not self._exists(name):
            body = {
                "vectors": {"size": vector_set.dimensions, "distance": "Cosine"},
                "optimizers_config": {"indexing_threshold": 0},
            }
            try:
                self._rest.call("PUT", ("collections", name), body, seconds=WRITE_SECONDS)
            except VectorStoreRejected:
                if not self._exists(name):
                    raise

    def upsert(self, vector_set: VectorSet, points: PointBatch) -> None:
        """Writes the points, in bodies of some 16 MB; returns when Qdrant has them on disk."""
        for part in split_batch(vector_set, points):
            body = upsert_body(vector_set, points, part)
            self._points(vector_set, "PUT", (), body, seconds=WRITE_SECONDS, wait=True)

    def delete(self, vector_set: VectorSet, keys: Sequence[Key]) -> None:
        """Removes the points of these keys."""
        for start in range(0, len(keys), _SCROLL_PAGE):
            ids = [point_uuid(vector_set, key) for key in keys[start : start + _SCROLL_PAGE]]
            self._points(vector_set, "POST", ("delete",), {"points": ids}, seconds=WRITE_SECONDS, wait=True)

    def fingerprints(self, vector_set: VectorSet, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every point whose `bits`-bit bucket is among `buckets` (None: of every point)."""
        if buckets is None:
            yield from self._scroll_fingerprints(vector_set, None)
            return
        ranges = bucket_ranges(buckets, bits, BUCKET_BITS)
        for start in range(0, len(ranges), _RANGES_PER_FILTER):
            part = ranges[start : start + _RANGES_PER_FILTER]
            yield from self._scroll_fingerprints(vector_set, bucket_filter(part))

    def vectors(self, vector_set: VectorSet, keys: Sequence[Key]) -> dict[Key, tuple[int, Vectors]]:
        """For each of these keys that has a point: its text hash and its vector, normalised."""
        by_id = {point_uuid(vector_set, key): key for key in keys}
        ids = list(by_id)
        found: dict[Key, tuple[int, Vectors]] = {}
        for start in range(0, len(ids), _IDS_PER_CALL):
            body = {"ids": ids[start : start + _IDS_PER_CALL], "with_payload": ["embedded_text"], "with_vector": True}
            for point in self._points(vector_set, "POST", (), body):
                vector = np.asarray(point["vector"], dtype=np.float32)
                found[by_id[point["id"]]] = (text_hash(point["payload"]["embedded_text"]), vector)
        return found

    def index_buckets(self, vector_set: VectorSet) -> None:
        """Has Qdrant index the bucket; what is indexed costs the load a tenth, so none of it is before its end."""
        self._index(vector_set, ["bucket"])

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        """Turns indexing on and returns when the collection stays green; as long as there is progress, it waits."""
        name = vector_set.versioned_name
        self._index(vector_set, payload_indexes(vector_set.filter_types))
        body = {"optimizers_config": {"indexing_threshold": _INDEXING_THRESHOLD_KB}}
        self._rest.call("PATCH", ("collections", name), body, seconds=WRITE_SECONDS)
        state: Any = None
        green_count, moved_at = 0, time.monotonic()
        while True:
            info = self._rest.call("GET", ("collections", name))
            status = info["status"]
            report(info.get("indexed_vectors_count") or 0, info.get("points_count") or 0)
            if status == "red":
                raise VectorStoreRejected(
                    f"Qdrant could not index collection {name}.", resolution="Look at Qdrant's log."
                )
            # Right after the switch a real server may say green before its optimizer has looked.
            green_count = green_count + 1 if status == "green" else 0
            kilobytes = (info.get("points_count") or 0) * vector_set.dimensions * 4 / 1024
            if green_count >= (_GREEN_POLLS if kilobytes >= _INDEXING_THRESHOLD_KB else 1):
                return
            if status == "grey":  # optimizations wait for a nudge
                self._rest.call("PATCH", ("collections", name), body, seconds=WRITE_SECONDS)
            now = (status, info.get("indexed_vectors_count"), info.get("segments_count"))
            if now != state:
                state, moved_at = now, time.monotonic()
            elif time.monotonic() - moved_at > _STALLED_SECONDS:
                raise VectorStoreUnavailable(f"Qdrant does not get on with the index of collection {name}.")
            time.sleep(_POLL_SECONDS)

    def count(self, vector_set: VectorSet) -> int:
        """The exact number of points; 0 where the collection does not exist."""
        try:
            return int(self._points(vector_set, "POST", ("count",), {"exact": True}, seconds=SLOW_SECONDS)["count"])
        except SetMissing:
            return 0

    def search(
        self,
        vector_set: VectorSet,
        vector: Vectors,
        *,
        limit: int,
        min_similarity_score: float | None = None,
        filters: Filter | None = None,
    ) -> list[Hit]:
        """The nearest points by cosine, highest first, among exactly those the filter matches."""
        if not vector.any():
            return []
        where = compile_filter(filters, vector_set.filter_types) if filters is not None else {}
        try:
            points = self._nearest(vector_set, vector, limit, where)
        except SetMissing as error:
            raise VectorStoreUnavailable(
                f"The vectors that were asked are not in the store: {error.message}",
                resolution="They were just replaced, then ask again; or the store has lost them, then start a backfill.",
            ) from None
        hits = [
            Hit(
                key=read_key(point["payload"]["pk"]),
                similarity_score=point["score"],
                metadata={
                    column_name(key): kept_float(value) if type(value) is float else value
                    for key, value in point["payload"].get("metadata", {}).items()
                },
                embedded_text=point["payload"]["embedded_text"],
            )
            for point in points
        ]
        return rank(hits, limit, min_similarity_score)

    def publish(self, vector_set: VectorSet) -> None:
        """Points the alias at this set's collection, in one request that does both halves or none."""
        alias, name = vector_set.public_name, vector_set.versioned_name
        target = self._alias_target(vector_set.vector_table_id, alias)
        if target == name:
            return
        actions: list[dict[str, Any]] = [{"delete_alias": {"alias_name": alias}}] if target else []
        actions.append({"create_alias": {"collection_name": name, "alias_name": alias}})
        self._rest.call("POST", ("collections", "aliases"), {"actions": actions})

    def versions(self, vector_table_id: str) -> list[int]:
        """The versions of this vector table that have a collection, ascending."""
        pattern = re.compile(re.escape(vector_table_id) + r"_v(\d+)")
        listed = self._rest.call("GET", ("collections",))["collections"]
        return sorted(int(match[1]) for item in listed if (match := pattern.fullmatch(item["name"])))

    def drop(self, vector_table_id: str, version: int) -> None:
        """Removes a collection, with an alias that points at it."""
        try:
            self._rest.call("DELETE", ("collections", f"{vector_table_id}_v{version}"), seconds=WRITE_SECONDS)
        except SetMissing:
            return

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        """Removes the alias."""
        if self._alias_target(vector_table_id, public_name):
            body = {"actions": [{"delete_alias": {"alias_name": public_name}}]}
            self._rest.call("POST", ("collections", "aliases"), body)

    def info(self, vector_set: VectorSet) -> Mapping[str, str | int]:
        """Where the set is, its points, and its index's state."""
        name = vector_set.versioned_name
        info = self._rest.call("GET", ("collections", name))
        return {
            "store": "qdrant",
            "address": self._rest.address,
            "collection": name,
            "alias": vector_set.public_name,
            "points": info.get("points_count") or 0,
            "indexed_vectors": info.get("indexed_vectors_count") or 0,
            "status": info["status"],
        }

    def close(self) -> None:
        """Gives connections back. Idempotent."""
        self._rest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _points(self, vector_set: VectorSet, method: str, path: tuple[str, ...], body: Any, **options: Any) -> Any:
        return self._rest.call(method, ("collections", vector_set.versioned_name, "points", *path), body, **options)

    def _index(self, vector_set: VectorSet, fields: Iterable[str]) -> None:
        path = ("collections", vector_set.versioned_name, "index")
        schemas = payload_indexes(vector_set.filter_types)
        for field in fields:
            schema = schemas[field]
            body: dict[str, Any] = {"field_name": field, "field_schema": schema}
            try:
                self._rest.call("PUT", path, body, seconds=SLOW_SECONDS, wait=True)
            except VectorStoreRejected:  # by a server too old to know these settings
                body["field_schema"] = schema["type"]
                self._rest.call("PUT", path, body, seconds=SLOW_SECONDS, wait=True)

    def _exists(self, name: str) -> bool:
        return bool(self._rest.call("GET", ("collections", name, "exists"))["exists"])

    def _alias_target(self, vector_table_id: str, alias: str) -> str | None:
        listed = self._rest.call("GET", ("aliases",))["aliases"]
        target = next((item["collection_name"] for item in listed if item["alias_name"] == alias), None)
        if target is not None and not target.startswith(f"{vector_table_id}_v"):
            raise VectorStoreRejected(
                f"Qdrant has an alias {alias} that is not of this vector table.",
                resolution=f"Rename or remove the alias {alias}, then try again.",
            )
        return str(target) if target is not None else None

    def _scroll_fingerprints(self, vector_set: VectorSet, where: dict[str, Any] | None) -> Iterator[Fingerprint]:
        body: dict[str, Any] = {"limit": _SCROLL_PAGE, "with_payload": ["pk", "row_hash", "bucket"]}
        if where is not None:
            body["filter"] = where
        while True:
            page = self._points(vector_set, "POST", ("scroll",), body)
            for point in page["points"]:
                payload = point["payload"]
                yield Fingerprint(read_key(payload["pk"]), payload["row_hash"], payload["bucket"])
            if page["next_page_offset"] is None:
                return
            body["offset"] = page["next_page_offset"]

    def _nearest(self, vector_set: VectorSet, vector: Vectors, limit: int, where: dict[str, Any]) -> list[Any]:
        """The nearest points, fewer than `limit` only if there are no more."""
        asked = limit
        exact = False
        while True:
            body = {
                "query": np.ascontiguousarray(vector, dtype=np.float32),
                "limit": asked,
                "filter": where,
                "params": {"exact": exact, "hnsw_ef": max(_HNSW_EF, 2 * asked), "acorn": _ACORN},
                "with_payload": ["pk", "embedded_text", "metadata"],
            }
            content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
            points: list[Any] = self._points(vector_set, "POST", ("query",), content)["points"]
            # A walk of the graph under a filter may end early: only an exact search knows that there is no more.
            complete = exact or len(points) >= asked
            zeros = self._zero_vectors(vector_set, points) if complete else set()
            if complete and (len(points) - len(zeros) >= limit or len(points) < asked):
                return [point for point in points if point["id"] not in zeros]
            exact = exact or not complete
            asked = limit + 2 * len(zeros)

    def _zero_vectors(self, vector_set: VectorSet, points: list[Any]) -> set[str]:
        """Those of the found points whose vector is all zeros: Qdrant gives them the similarity 0."""
        ids = [point["id"] for point in points if point["score"] == 0]
        if not ids:
            return set()
        body = {"ids": ids, "with_payload": False, "with_vector": True}
        return {point["id"] for point in self._points(vector_set, "POST", (), body) if not any(point["vector"])}
