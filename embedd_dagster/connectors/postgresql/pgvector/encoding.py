"""What a database cannot hold, such as a character that its encoding lacks. It only says that there is one: found by halves."""

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
    """Those of `count` things that an attempt at them is refused for; `attempt(start, stop)` is made until all others are in."""
    refused: dict[int, ValueRejected] = {}
    parts = [(0, count)] if count else []
    while parts:
        start, stop = parts.pop()
        try:
            attempt(start, stop)
        except ValueRejected as error:
            if stop - start == 1:
                refused[start] = error
                continue
            middle = (start + stop) // 2
            parts += [(middle, stop), (start, middle)]
    return refused


def write_holdable(points: PointBatch, write: Callable[[PointBatch], None]) -> dict[int, RowError]:
    """Writes every point that the database can hold; why it cannot hold the others, by their index."""

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
