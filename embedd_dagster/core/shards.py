"""Key ranges of a table, and the packing of rows into batches by items, tokens and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from embedd_dagster.core.keys import Key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The keys above `lower` (exclusive) up to `upper` (inclusive); None is unbounded. Ordered by the source, not by us."""

    lower: Key | None = None
    upper: Key | None = None


def ranges_between(boundaries: list[Key]) -> list[KeyRange]:
    """The ranges that these ascending boundaries cut the whole table into: one more than boundaries."""
    edges: list[Key | None] = [None, *boundaries, None]
    return [KeyRange(lower, upper) for lower, upper in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one request to an embedder, and one write to a store, may hold."""

    max_items: int
    max_tokens: int
    max_bytes: int = 8 * 2**20


def pack_batches(items: Iterable[tuple[T, int, int]], limits: BatchLimits) -> Iterator[list[T]]:
    """Consecutive batches of (item, tokens, bytes), each within every limit; an item over a limit is a batch of its own.

    Lazy: holds one batch. Never yields an empty batch.
    """
    batch: list[T] = []
    tokens_in_batch = bytes_in_batch = 0
    for item, tokens, size in items:
        full = (
            len(batch) >= limits.max_items
            or tokens_in_batch + tokens > limits.max_tokens
            or bytes_in_batch + size > limits.max_bytes
        )
        if batch and full:
            yield batch
            batch, tokens_in_batch, bytes_in_batch = [], 0, 0
        batch.append(item)
        tokens_in_batch += tokens
        bytes_in_batch += size
    if batch:
        yield batch


def in_chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of at most `size` items; none for an empty sequence."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
