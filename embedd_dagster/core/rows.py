"""The values that flow through the engine: rows of a source, points of a store, and the fingerprints of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedd_dagster.core.keys import Key
from embedd_dagster.core.vector_table import FilterType

BUCKET_BITS = 16
"""A row's stored bucket is a hash of its key into 2^16; a digest over 2^k buckets takes the k highest of these bits."""

Vectors = NDArray[np.float32]
"""Vectors of n texts: float32, shape (n, dimensions)."""


class SourceRow(NamedTuple):
    """One row as read. `values` stand in the order of the selection's columns."""

    key: Key
    values: tuple[Any, ...]
    row_hash: int
    """Signed 64-bit, opaque: computed by the source over the selected columns."""
    bucket: int
    """0 … 2^16 - 1, opaque: a hash of the key."""


class Fingerprint(NamedTuple):
    """What tells whether a row has changed, on the source's side and on the store's."""

    key: Key
    row_hash: int
    bucket: int


@dataclass(frozen=True, slots=True)
class TableDigest:
    """A table at one instant: one opaque value for each of 2^bits buckets, 0 for an empty one."""

    bits: int
    values: NDArray[np.int64]
    row_count: int

    def changed_buckets(self, earlier: TableDigest | None) -> list[int] | None:
        """The buckets (of `bits` bits) that differ from an earlier digest, or None where all may: the two do not compare."""
        if earlier is None or earlier.bits != self.bits:
            return None
        return [int(bucket) for bucket in np.nonzero(self.values != earlier.values)[0]]


def digest_bits(row_count: int) -> int:
    """The bucket count, as a power of two, at which a bucket of a table holds some 500 rows; 0 … 16."""
    return max(0, min(BUCKET_BITS, (row_count // 512).bit_length()))


@dataclass(frozen=True, slots=True)
class VectorSet:
    """One version of a vector table's vectors in a store: what the store must know to make, fill and search it."""

    vector_table_id: str
    version: int
    public_name: str
    """The stable name for users who come by the store's own interface (`core.vector_table.storage_name`)."""
    dimensions: int
    filter_types: Mapping[str, FilterType]
    key_type: str | None = None
    """The source's own type name of the primary key, for stores in the source database."""

    @property
    def versioned_name(self) -> str:
        """`vt_<id>_v<version>`: unique, never reused, at most 40 characters."""
        return f"{self.vector_table_id}_v{self.version}"


@dataclass(slots=True)
class PointBatch:
    """Points to upsert, column by column: index i of every field is one point. `vectors` has shape (n, dimensions).

    A point is identified by its row's key and its ordinal within the row.
    """

    keys: list[Key]
    texts: list[str]
    metadata: list[dict[str, Any]]
    row_hashes: list[int]
    text_hashes: list[int]
    """Each text's `core.embedded_text.text_hash`."""
    buckets: list[int]
    vectors: Vectors
    ordinals: list[int] | None = None
    """Each point's ordinal; None if every row has one point, of ordinal 0."""

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, start: int, stop: int) -> PointBatch:
        """The points of these indexes."""
        return PointBatch(
            self.keys[start:stop],
            self.texts[start:stop],
            self.metadata[start:stop],
            self.row_hashes[start:stop],
            self.text_hashes[start:stop],
            self.buckets[start:stop],
            self.vectors[start:stop],
            None if self.ordinals is None else self.ordinals[start:stop],
        )


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result; the similarity is the cosine."""

    key: Key
    similarity_score: float
    metadata: dict[str, Any]
    embedded_text: str
