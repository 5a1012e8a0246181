"""What every store does in the same way: the order of hits, and bucket numbers as ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from embedd_dagster.core.keys import encode_key
from embedd_dagster.core.rows import Hit


def rank(hits: Iterable[Hit], limit: int, min_similarity_score: float | None) -> list[Hit]:
    """The best hits, highest first, equal ones by key; scores within -1 … 1, none below the minimum."""
    clipped = (replace(hit, similarity_score=max(-1.0, min(1.0, hit.similarity_score))) for hit in hits)
    wanted = (hit for hit in clipped if min_similarity_score is None or hit.similarity_score >= min_similarity_score)
    return sorted(wanted, key=lambda hit: (-hit.similarity_score, encode_key(hit.key)))[:limit]


def bucket_ranges(buckets: Sequence[int], bits: int, stored_bits: int) -> list[tuple[int, int]]:
    """The inclusive ranges of stored buckets that these `bits`-bit buckets are, ascending, neighbours joined."""
    width = 1 << (stored_bits - bits)
    ranges: list[tuple[int, int]] = []
    for bucket in sorted(set(buckets)):
        low, high = bucket * width, (bucket + 1) * width - 1
        if ranges and ranges[-1][1] == low - 1:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return ranges
