"""Vectors in Qdrant: a collection a set, an alias for the public name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import httpx
import numpy as np
import structlog
from qdrant_client import models

from embedd_dagster.connectors.qdrant.calls import SCROLL_PAGE, PointCalls
from embedd_dagster.connectors.qdrant.client import READ_SECONDS, SLOW_SECONDS, WRITE_SECONDS, QdrantRest
from embedd_dagster.connectors.qdrant.failures import LimitExceeded, SetMissing
from embedd_dagster.connectors.qdrant.filters import bucket_filter, column_name, payload_indexes
from embedd_dagster.connectors.qdrant.grpc_calls import QdrantGrpc
from embedd_dagster.connectors.qdrant.indexing import wait_for_index
from embedd_dagster.connectors.qdrant.limits import CollectionLimits
from embedd_dagster.connectors.qdrant.messages import GetPoints, GetResponse, PointsOperationResponse, read_vector
from embedd_dagster.connectors.qdrant.points import point_uuid, read_key, split_batch, upsert_body, upsert_message
from embedd_dagster.connectors.qdrant.search import nearest
from embedd_dagster.core.embedded_text import text_hash
from embedd_dagster.core.keys import Key
from embedd_dagster.core.ranking import bucket_ranges, rank
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, Hit, PointBatch, Vectors, VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import ReportIndexed, SearchRequest, ignore_report

_IDS_PER_CALL: Final = 1_000
_RANGES_PER_FILTER: Final = 64
_OLDEST_VERSION: Final = (1, 10)
_ADVISED_VERSION: Final = (1, 17)

_log = structlog.get_logger(__name__)


class QdrantStore:
    """An open Qdrant. Safe to use from several threads.

    Bulk writes and reads of vectors go over gRPC if `grpc_port` is given and can be reached, everything else over REST.

    Collections use cosine: Qdrant stores vectors normalised, and `vectors` returns them so. To reuse one is to store the
    same direction again. A vector of zeros has no direction: it is stored and counted, and never found.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        grpc_port: int | None = None,
        transport: httpx.BaseTransport | None = None,
        read_timeout_seconds: float | None = None,
    ) -> None:
        self._rest = QdrantRest(url, api_key, transport, read_timeout_seconds=read_timeout_seconds or READ_SECONDS)
        self._grpc = QdrantGrpc(self._rest, grpc_port)
        self._calls = PointCalls(self._rest)
        self._is_version_checked = False

    def check(self) -> None:
        """Returns when Qdrant answers to this key. Raises VectorStoreRejected if its version is too old."""
        # asks for the key, and costs the same however many collections there are
        self._rest.call("GET", ("collections", "embedd", "exists"))
        if not self._is_version_checked:
            self._check_version()
            self._is_version_checked = True

    def create(self, vector_set: VectorSet) -> None:
        """A collection that is not indexed while it is loaded; one that is there is kept."""
        name = vector_set.versioned_name
        if not self._exists(name):
            body = models.CreateCollection(
                vectors=models.VectorParams(size=vector_set.dimensions, distance=models.Distance.COSINE),
                optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
            )
            try:
                self._rest.call("PUT", ("collections", name), body, seconds=WRITE_SECONDS)
            except VectorStoreRejected:
                if not self._exists(name):
                    raise

    def upsert(self, vector_set: VectorSet, points: PointBatch) -> None:
        """Writes the points, in bodies of some 16 MB; returns when Qdrant has them on disk."""

        def write(part: slice) -> None:
            if self._grpc.is_used(vector_set):
                message = upsert_message(vector_set, points, part)
                self._grpc.call("Points/Upsert", message, PointsOperationResponse, seconds=WRITE_SECONDS)
                return
            body = upsert_body(vector_set, points, part)
            self._calls.call(vector_set, "PUT", (), body, seconds=WRITE_SECONDS, wait=True)

        for part in split_batch(vector_set, points):
            self._calls.in_parts(vector_set, part, CollectionLimits.points_to_write, write)

    def delete(self, vector_set: VectorSet, keys: Sequence[Key]) -> None:
        """Removes the points of these keys."""

        def delete(part: slice) -> None:
            ids = [point_uuid(vector_set, key) for key in keys[part]]
            self._calls.call(vector_set, "POST", ("delete",), {"points": ids}, seconds=WRITE_SECONDS, wait=True)

        for part in _slices(len(keys), SCROLL_PAGE):
            self._calls.in_parts(vector_set, part, CollectionLimits.ids_to_delete, delete)

    def fingerprints(self, vector_set: VectorSet, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every point whose `bits`-bit bucket is among `buckets` (None: of every point)."""
        limits = self._calls.read_limits(vector_set)
        if buckets is None:
            yield from self._scroll_fingerprints(vector_set, limits, None)
            return
        ranges = bucket_ranges(buckets, bits, BUCKET_BITS)
        for part in _slices(len(ranges), limits.conditions(_RANGES_PER_FILTER)):
            yield from self._scroll_fingerprints(vector_set, limits, bucket_filter(ranges[part]))

    def vectors(self, vector_set: VectorSet, keys: Sequence[Key]) -> dict[Key, tuple[int, Vectors]]:
        """For each of these keys that has a point: its text hash and its vector, normalised."""
        by_id = {point_uuid(vector_set, key): key for key in keys}
        ids = list(by_id)
        found: dict[Key, tuple[int, Vectors]] = {}

        def read(part: slice) -> None:
            for point_id, text, vector in self._read_vectors(vector_set, ids[part]):
                found[by_id[point_id]] = (text_hash(text), vector)

        for part in _slices(len(ids), _IDS_PER_CALL):
            self._calls.in_parts(vector_set, part, CollectionLimits.ids_to_read, read)
        return found

    def index_buckets(self, vector_set: VectorSet) -> None:
        """Has Qdrant index the bucket; what is indexed costs the load a tenth, so none of it is before its end."""
        self._index(vector_set, ["bucket"])

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        """Turns indexing on and returns when the collection stays green, or its index is complete."""
        self._index(vector_set, payload_indexes(vector_set.filter_types))
        wait_for_index(self._rest, vector_set, report)

    def count(self, vector_set: VectorSet) -> int:
        """The exact number of points; 0 where the collection does not exist."""
        try:
            return self._calls.within_limits(vector_set, lambda limits: self._count(vector_set, limits))
        except SetMissing:
            return 0

    def search(self, vector_set: VectorSet, request: SearchRequest) -> list[Hit]:
        """The nearest points by cosine, highest first, among exactly those the filter matches."""
        if not request.vector.any():
            return []
        try:
            points = self._calls.within_limits(
                vector_set,
                lambda limits: nearest(self._calls, vector_set, request.vector, request.limit, request.filter, limits),
            )
        except SetMissing as error:
            raise VectorStoreUnavailable(
                f"The vectors that were asked are not in the store: {error.message}",
                resolution="They were just replaced, then ask again; or the store has lost them, then start a backfill.",
            ) from None
        hits = [
            Hit(
                key=read_key(point["payload"]["pk"]),
                similarity_score=point["score"],
                metadata={column_name(key): value for key, value in point["payload"].get("metadata", {}).items()},
                embedded_text=point["payload"]["embedded_text"],
            )
            for point in points
        ]
        return rank(hits, request.limit, request.minimum_score)

    def publish(self, vector_set: VectorSet) -> None:
        """Points the alias at this set's collection, away from the one that it may have, in one step."""
        alias, name = vector_set.public_name, vector_set.versioned_name
        target = self._alias_target(vector_set.vector_table_id, alias)
        if target == name:
            return
        # Qdrant replaces an alias of that name. To delete it first would save its file twice, and a crash between the two
        # would leave no alias.
        create = models.CreateAlias(collection_name=name, alias_name=alias)
        self._change_alias(models.CreateAliasOperation(create_alias=create))

    def versions(self, vector_table_id: str) -> list[int]:
        """The versions of this vector table that have a collection, ascending."""
        pattern = re.compile(re.escape(vector_table_id) + r"_v(\d+)")
        listed = self._rest.call("GET", ("collections",))["collections"]
        return sorted(int(match[1]) for item in listed if (match := pattern.fullmatch(item["name"])))

    def drop(self, vector_table_id: str, version: int) -> None:
        """Removes a collection, with an alias that points at it."""
        name = f"{vector_table_id}_v{version}"
        self._calls.forget(name)
        try:
            self._rest.call("DELETE", ("collections", name), seconds=WRITE_SECONDS)
        except SetMissing:
            return

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        """Removes the alias."""
        if self._alias_target(vector_table_id, public_name):
            self._change_alias(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=public_name)))

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
        """Closes the connections. Idempotent."""
        self._grpc.close()
        self._rest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_version(self) -> None:
        version = self._rest.version()
        if version is None or version >= _ADVISED_VERSION:
            return
        written = ".".join(map(str, version))
        advice = f"Upgrade Qdrant to {'.'.join(map(str, _ADVISED_VERSION))} or later."
        if version < _OLDEST_VERSION:
            raise VectorStoreRejected(
                f"Qdrant at {self._rest.address} is version {written}, which lacks calls that are needed.",
                resolution=advice,
            )
        _log.warning(
            "Qdrant is old: filtered searches are slower and index builds take longer", version=written, advice=advice
        )

    def _index(self, vector_set: VectorSet, fields: Iterable[str]) -> None:
        path = ("collections", vector_set.versioned_name, "index")
        schemas = payload_indexes(vector_set.filter_types)
        left_out = []
        for field in fields:
            body = models.CreateFieldIndex(field_name=field, field_schema=schemas[field])
            try:
                self._rest.call("PUT", path, body, seconds=SLOW_SECONDS, wait=True)
            except LimitExceeded:
                limits = self._calls.read_limits(vector_set)
                if limits.max_payload_index_count is None or limits.unindexed_filtering_retrieve is False:
                    raise
                left_out.append(field)
        if left_out:
            _log.warning(
                "columns without a payload index, as strict mode allows no more: filters on them are slow",
                collection=vector_set.versioned_name,
                max_payload_index_count=limits.max_payload_index_count,
                fields=left_out,
            )

    def _read_vectors(self, vector_set: VectorSet, ids: list[str]) -> Iterator[tuple[str, str, Vectors]]:
        if self._grpc.is_used(vector_set):
            request = GetPoints(
                collection_name=vector_set.versioned_name,
                ids=[{"uuid": point_id} for point_id in ids],
                with_payload={"include": {"fields": ["embedded_text"]}},
                with_vectors={"enable": True},
            )
            answer = self._grpc.call("Points/Get", request, GetResponse, seconds=WRITE_SECONDS)
            for found in answer.result:
                yield found.id.uuid, found.payload["embedded_text"].string_value, read_vector(found.vectors.vector)
            return
        body = {"ids": ids, "with_payload": ["embedded_text"], "with_vector": True}
        for point in self._calls.call(vector_set, "POST", (), body):
            vector = np.asarray(point["vector"], dtype=np.float32)
            yield point["id"], point["payload"]["embedded_text"], vector

    def _exists(self, name: str) -> bool:
        return bool(self._rest.call("GET", ("collections", name, "exists"))["exists"])

    def _change_alias(self, action: models.AliasOperations) -> None:
        self._rest.call("POST", ("collections", "aliases"), models.ChangeAliasesOperation(actions=[action]))

    def _alias_target(self, vector_table_id: str, alias: str) -> str | None:
        listed = self._rest.call("GET", ("aliases",))["aliases"]
        target = next((item["collection_name"] for item in listed if item["alias_name"] == alias), None)
        if target is not None and not target.startswith(f"{vector_table_id}_v"):
            raise VectorStoreRejected(
                f"Qdrant has an alias {alias} that is not of this vector table.",
                resolution=f"Rename or remove the alias {alias}, then try again.",
            )
        return str(target) if target is not None else None

    def _scroll_fingerprints(
        self, vector_set: VectorSet, limits: CollectionLimits, where: dict[str, Any] | None
    ) -> Iterator[Fingerprint]:
        for point in self._calls.scroll(vector_set, limits, where, with_payload=["pk", "row_hash", "bucket"]):
            payload = point["payload"]
            yield Fingerprint(read_key(payload["pk"]), payload["row_hash"], payload["bucket"])

    def _count(self, vector_set: VectorSet, limits: CollectionLimits) -> int:
        if limits.allows_exact:
            return int(self._calls.call(vector_set, "POST", ("count",), {"exact": True}, seconds=SLOW_SECONDS)["count"])
        return sum(1 for _ in self._calls.scroll(vector_set, limits, None, with_payload=False))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
