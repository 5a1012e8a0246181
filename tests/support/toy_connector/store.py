"""A vector store in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.filters import matches
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.ranking import rank
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, Hit, PointBatch, Vectors, VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import ReportIndexed, SearchRequest, ignore_report


class _Point(NamedTuple):
    key: Key
    text: str
    metadata: dict[str, Any]
    row_hash: int
    text_hash: int
    bucket: int
    vector: Vectors


_Points = dict[tuple[str, int], _Point]
"""By the encoded key and the ordinal."""


@dataclass
class SetsInMemory:
    """The sets of one store, and its public names."""

    sets: dict[tuple[str, int], _Points] = field(default_factory=dict)
    """By vector table and version."""
    public: dict[str, tuple[str, int]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def read_public(self, name: str) -> list[str]:
        """The texts that a user of the public name sees. Raises KeyError."""
        with self.lock:
            return [point.text for point in self.sets[self.public[name]].values()]


def _place(vector_set: VectorSet) -> tuple[str, int]:
    return vector_set.vector_table_id, vector_set.version


def _clean(value: Any) -> Any:
    return clean_text(value) if isinstance(value, str) else value


class ToyStore:
    """Both the managed and the platform store."""

    schema = "main"

    def __init__(self, data: SetsInMemory) -> None:
        self.data = data

    def check(self) -> None:
        pass

    def unholdable(self, texts: Sequence[str]) -> Mapping[int, str]:
        return {}

    def create(self, vector_set: VectorSet) -> None:
        with self.data.lock:
            self.data.sets.setdefault(_place(vector_set), {})

    def upsert(self, vector_set: VectorSet, points: PointBatch) -> None:
        with self.data.lock:
            stored = self.data.sets.get(_place(vector_set))
            if stored is None:
                raise VectorStoreRejected(f"Set {vector_set.versioned_name} does not exist.")
            for index, key in enumerate(points.keys):
                metadata = {name: _clean(value) for name, value in points.metadata[index].items() if value is not None}
                ordinal = points.ordinals[index] if points.ordinals else 0
                stored[encode_key(key), ordinal] = _Point(
                    key,
                    clean_text(points.texts[index]),
                    metadata,
                    points.row_hashes[index],
                    points.text_hashes[index],
                    points.buckets[index],
                    points.vectors[index].copy(),
                )

    def delete(self, vector_set: VectorSet, keys: Sequence[Key]) -> None:
        gone = set(map(encode_key, keys))
        with self.data.lock:
            stored = self._points(vector_set)
            for place in [place for place in stored if place[0] in gone]:
                del stored[place]

    def fingerprints(self, vector_set: VectorSet, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        with self.data.lock:
            found = {text: point for (text, _), point in self._points(vector_set).items()}
        for point in found.values():
            if buckets is None or point.bucket >> (BUCKET_BITS - bits) in buckets:
                yield Fingerprint(point.key, point.row_hash, point.bucket)

    def vectors(self, vector_set: VectorSet, keys: Sequence[Key]) -> dict[Key, tuple[int, Vectors]]:
        with self.data.lock:
            stored = self._points(vector_set)
            found = {key: stored.get((encode_key(key), 0)) for key in keys}
        return {key: (point.text_hash, point.vector) for key, point in found.items() if point is not None}

    def index_buckets(self, vector_set: VectorSet) -> None:
        pass

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        pass

    def count(self, vector_set: VectorSet) -> int:
        with self.data.lock:
            return len({text for text, _ in self.data.sets.get(_place(vector_set), {})})

    def search(self, vector_set: VectorSet, request: SearchRequest) -> list[Hit]:
        with self.data.lock:
            points = list(self._points(vector_set).values())
        if request.filter is not None:
            points = [point for point in points if matches(request.filter, point.metadata)]
        if not points or not request.vector.any():
            return []
        matrix = np.stack([point.vector for point in points]).astype(np.float64)
        lengths = np.linalg.norm(matrix, axis=1)
        question = request.vector.astype(np.float64)
        scores = matrix @ question / (np.where(lengths == 0, 1, lengths) * np.linalg.norm(question))
        hits = (
            Hit(point.key, float(score), dict(point.metadata), point.text)
            for point, score, length in zip(points, scores, lengths, strict=True)
            if length > 0
        )
        return rank(hits, request.limit, request.minimum_score)

    def publish(self, vector_set: VectorSet) -> None:
        with self.data.lock:
            self.data.public[vector_set.public_name] = _place(vector_set)

    def versions(self, vector_table_id: str) -> list[int]:
        with self.data.lock:
            return sorted(version for table, version in self.data.sets if table == vector_table_id)

    def drop(self, vector_table_id: str, version: int) -> None:
        with self.data.lock:
            self.data.sets.pop((vector_table_id, version), None)

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        with self.data.lock:
            self.data.public.pop(public_name, None)

    def info(self, vector_set: VectorSet) -> Mapping[str, str | int]:
        return {"store": "toy", "set": vector_set.versioned_name, "points": self.count(vector_set)}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _points(self, vector_set: VectorSet) -> _Points:
        found = self.data.sets.get(_place(vector_set))
        if found is None:
            raise VectorStoreUnavailable(f"Set {vector_set.versioned_name} does not exist.")
        return found
