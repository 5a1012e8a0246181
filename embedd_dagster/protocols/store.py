"""What a vector store must be able to do: keep versioned sets of points, search them, and publish one atomically.

A vector table's vectors are in *vector sets*, one per version (`core.rows.VectorSet`). A set is built next to the live one
and then published under the table's public name. Every method is idempotent, so a killed run may repeat it.
Stores raise only VectorStoreUnavailable (transient), VectorStoreRejected, and SourceAccessDenied (platform mode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from embedd_dagster.core.filters import Filter
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import Fingerprint, Hit, PointBatch, Vectors, VectorSet

ReportIndexed = Callable[[int, int], None]
"""Called with the number of vectors in the index so far, and the number of all vectors."""


def ignore_report(indexed: int, total: int) -> None:
    """Does nothing."""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """What is searched for in one vector set."""

    vector: Vectors
    """The question's vector, of shape (dimensions,)."""
    limit: int
    text: str | None = None
    """The question's text, for stores that also search by words; the others ignore it."""
    filter: Filter | None = None
    minimum_score: float | None = None
    """The least cosine similarity of a hit."""


class Store(Protocol):
    """An open vector store. Safe to use from several threads."""

    def check(self) -> None:
        """Returns if the store answers and sets can be created in it."""
        ...

    def create(self, vector_set: VectorSet) -> None:
        """Creates an empty set for a bulk load, without the indexes that are cheaper to build at the end.

        A set that already exists is kept with its points.
        """
        ...

    def upsert(self, vector_set: VectorSet, points: PointBatch) -> None:
        """Writes the points durably; a point of the same key and ordinal is replaced. All or nothing is not promised.

        Raises PointsRejected if the store cannot hold some of them: the others are written then.
        """
        ...

    def delete(self, vector_set: VectorSet, keys: Sequence[Key]) -> None:
        """Removes every point of these keys; keys without a point are ignored."""
        ...

    def fingerprints(self, vector_set: VectorSet, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every row with points whose `bits`-bit bucket is among `buckets` (None: of every such row)."""
        ...

    def vectors(self, vector_set: VectorSet, keys: Sequence[Key]) -> dict[Key, tuple[int, Vectors]]:
        """For each of these keys that has a point: text hash and vector of its first (ordinal 0), shape (dimensions,)."""
        ...

    def index_buckets(self, vector_set: VectorSet) -> None:
        """Returns when fingerprints of a few buckets can be read without reading the whole set."""
        ...

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        """Builds the indexes and returns when the set can be searched fast.

        Meanwhile `report` is called every few seconds. An error of it ends the wait, not the store's work.
        """
        ...

    def count(self, vector_set: VectorSet) -> int:
        """The exact number of rows that have points, however many each has; 0 if the set does not exist."""
        ...

    def search(self, vector_set: VectorSet, request: SearchRequest) -> list[Hit]:
        """The nearest points by cosine, highest first, among exactly those that the filter matches.

        As many as the limit, if so many match. A vector of zeros has no direction: it is never found, and finds nothing.
        Raises VectorStoreUnavailable if the set does not exist: most likely another one has just replaced it.
        """
        ...

    def publish(self, vector_set: VectorSet) -> None:
        """Points the public name at this set, atomically."""
        ...

    def versions(self, vector_table_id: str) -> list[int]:
        """The versions of this vector table that exist in the store, ascending: what a teardown removes."""
        ...

    def drop(self, vector_table_id: str, version: int) -> None:
        """Removes a set, if it exists."""
        ...

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        """Removes the alias or view of a deleted vector table, if it exists."""
        ...

    def info(self, vector_set: VectorSet) -> Mapping[str, str | int]:
        """Facts about a set for operators: where it is, its points, the state of its index."""
        ...

    def close(self) -> None:
        """Closes connections. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlatformStore(Store, Protocol):
    """A store inside a source database."""

    @property
    def schema(self) -> str:
        """The schema in which new vector tables are created, for `platform_vector_ref`."""
        ...

    def unholdable(self, texts: Sequence[str]) -> Mapping[int, str]:
        """Why the database cannot hold some of these texts, by their index."""
        ...
