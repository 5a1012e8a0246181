"""What a vector store must be able to do: keep versioned sets of points, search them, and publish one atomically.

A vector table's vectors live in *sets*, one per version (`core.rows.VectorSet`). A set is built beside the live one and
then published under the table's public name. Every method but `search` is idempotent, so a killed run may repeat it.
Stores raise only: VectorStoreUnavailable (try again), VectorStoreRejected, SourceAccessDenied (platform mode).
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
"""Takes how many vectors are in the index so far, and how many there are."""


def ignore_report(indexed: int, total: int) -> None:
    """Does nothing with it."""


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
        """Returns when the store answers and sets could be made in it."""
        ...

    def create(self, vector_set: VectorSet) -> None:
        """An empty set, ready for bulk load: nothing is indexed yet that is dearer to keep than to build at the end.

        A set that is there already is kept with its points.
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
        """Returns when fingerprints of a few buckets can be had without reading the whole set."""
        ...

    def finish_load(self, vector_set: VectorSet, report: ReportIndexed = ignore_report) -> None:
        """Builds what searching needs and returns when the set is ready to be searched fast.

        Meanwhile `report` is called every few seconds. What it raises ends the wait, not what the store has begun.
        """
        ...

    def count(self, vector_set: VectorSet) -> int:
        """The exact number of rows that have points, however many each has; 0 if the set does not exist."""
        ...

    def search(self, vector_set: VectorSet, request: SearchRequest) -> list[Hit]:
        """The nearest points by cosine, highest first, among exactly those that the filter matches.

        As many as the limit, if so many match. A vector of zeros has no direction: none is found, and it finds none.
        Raises VectorStoreUnavailable where the set is not there: another one has most likely replaced it just now.
        """
        ...

    def publish(self, vector_set: VectorSet) -> None:
        """Points the public name at this set, in one atomic step."""
        ...

    def versions(self, vector_table_id: str) -> list[int]:
        """The versions of this vector table that exist in the store, ascending: what a teardown has to remove."""
        ...

    def drop(self, vector_table_id: str, version: int) -> None:
        """Removes a set; one that is not there is fine."""
        ...

    def drop_public_name(self, vector_table_id: str, public_name: str) -> None:
        """Removes the alias or view of a vector table that is deleted; one that is not there is fine."""
        ...

    def info(self, vector_set: VectorSet) -> Mapping[str, str | int]:
        """What an operator wants to see of a set: where it is, its points, its index's state."""
        ...

    def close(self) -> None:
        """Gives connections back. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlatformStore(Store, Protocol):
    """A store inside a source database."""

    @property
    def schema(self) -> str:
        """The schema in which new vector tables are made, for `platform_vector_ref`."""
        ...

    def unholdable(self, texts: Sequence[str]) -> Mapping[int, str]:
        """Why the database cannot hold some of these texts, by their index."""
        ...
