"""Source fingerprints against stored ones → what to read again and what to delete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import Fingerprint


@dataclass(frozen=True, slots=True)
class ChangePlan:
    """What makes a store equal to its source."""

    changed: list[Fingerprint]
    """Rows of the source that are new, or whose hash differs: to be read again, then embedded or rewritten."""
    deleted: list[Key]
    """Keys of points whose row is gone."""
    unchanged_count: int


def plan_changes(source: Iterable[Fingerprint], stored: Iterable[Fingerprint]) -> ChangePlan:
    """The plan for one part of a table. Both sides must be complete for that part: a failed read is not an empty one."""
    left = {encode_key(point.key): point for point in stored}
    changed: list[Fingerprint] = []
    unchanged_count = 0
    for row in source:
        point = left.pop(encode_key(row.key), None)
        if point is not None and point.row_hash == row.row_hash and point.bucket == row.bucket:
            unchanged_count += 1
        else:
            changed.append(row)
    return ChangePlan(changed, [point.key for point in left.values()], unchanged_count)
