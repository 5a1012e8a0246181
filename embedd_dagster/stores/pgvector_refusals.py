"""Which points of a batch a database cannot hold: found by halves, as a server says only that there is one."""

from __future__ import annotations

from collections.abc import Callable

from embedd_dagster.core.rows import PointBatch
from embedd_dagster.errors import RowError, RowNotStorable
from embedd_dagster.stores.pgvector_database import ValueRefused


def write_holdable(points: PointBatch, write: Callable[[PointBatch], None]) -> dict[int, RowError]:
    """Writes every point that the database can hold; why it cannot hold the others, by their index."""
    rejected: dict[int, RowError] = {}
    parts = [(0, len(points))] if len(points) else []
    while parts:
        start, stop = parts.pop()
        try:
            write(points if stop - start == len(points) else points.part(start, stop))
        except ValueRefused as error:
            if stop - start == 1:
                rejected[start] = RowNotStorable(error.message)
                continue
            middle = (start + stop) // 2
            parts += [(middle, stop), (start, middle)]
    return rejected
