"""Values that a database cannot hold, such as a character that its encoding lacks. Bisection finds which ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from embedd_dagster.connectors.postgresql.pgvector.database import ValueRejected
from embedd_dagster.core.filters import And, Condition, Filter, Operator, Or, Scalar
from embedd_dagster.core.rows import PointBatch
from embedd_dagster.errors import RowError, RowNotStorable

_EQUALITIES = {
    Operator.EQ: Operator.IN,
    Operator.NEQ: Operator.NIN,
    Operator.IN: Operator.IN,
    Operator.NIN: Operator.NIN,
}


def find_rejected(count: int, attempt: Callable[[int, int], None]) -> dict[int, ValueRejected]:
    """The errors of the items that are rejected, by index. `attempt(start, stop)` is called until all other items succeed."""
    rejected: dict[int, ValueRejected] = {}
    parts = [(0, count)] if count else []
    while parts:
        start, stop = parts.pop()
        try:
            attempt(start, stop)
        except ValueRejected as error:
            if stop - start == 1:
                rejected[start] = error
                continue
            middle = (start + stop) // 2
            parts += [(middle, stop), (start, middle)]
    return rejected


def write_holdable(points: PointBatch, write: Callable[[PointBatch], None]) -> dict[int, RowError]:
    """Writes every point that the database can hold; returns why it cannot hold the others, by their index."""

    def attempt(start: int, stop: int) -> None:
        write(points if stop - start == len(points) else points.part(start, stop))

    return {index: RowNotStorable(error.message) for index, error in find_rejected(len(points), attempt).items()}


def compared_texts(tree: Filter) -> Iterator[str]:
    """The texts that metadata is compared with."""
    if isinstance(tree, And | Or):
        for part in tree.parts:
            yield from compared_texts(part)
    else:
        yield from (value for value in _values(tree) if isinstance(value, str))


def without_texts(tree: Filter, absent: frozenset[str]) -> Filter:
    """A filter of the same meaning in a database that has none of these texts."""
    if isinstance(tree, And | Or):
        return type(tree)(tuple(without_texts(part, absent) for part in tree.parts))
    if tree.operator not in _EQUALITIES:
        return tree
    left = tuple(value for value in _values(tree) if not (isinstance(value, str) and value in absent))
    return Condition(tree.column, _EQUALITIES[tree.operator], left)


def _values(condition: Condition) -> tuple[Scalar, ...]:
    return condition.value if isinstance(condition.value, tuple) else (condition.value,)
