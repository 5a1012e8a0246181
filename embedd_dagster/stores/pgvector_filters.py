"""Filters as SQL over the `metadata` column, each value a parameter; and the indexes that serve them.

Every condition is true or false, never null, so that `NOT` means what `core.filters.matches` means. Equality is containment
in the JSON document, which compares texts by their bytes and numbers exactly, and which one GIN index serves for all columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from psycopg import sql

from embedd_dagster.core.filters import And, Condition, Filter, Operator, Or, Scalar
from embedd_dagster.core.vector_table import FilterType

MAX_RANGE_INDEXES: Final = 16
"""Each makes every write dearer; ranges over further columns are found by scanning."""

_COMPARISONS: Final = {
    Operator.GT: sql.SQL(">"),
    Operator.GTE: sql.SQL(">="),
    Operator.LT: sql.SQL("<"),
    Operator.LTE: sql.SQL("<="),
}
_RANGED: Final = frozenset({FilterType.INTEGER, FilterType.FLOAT})


def compile_filter(tree: Filter) -> sql.Composable:
    """The SQL condition of exactly the rows for which `core.filters.matches` is true. Its values are literals in it."""
    if isinstance(tree, And | Or):
        if not tree.parts:
            return sql.SQL("TRUE") if isinstance(tree, And) else sql.SQL("FALSE")
        joint = sql.SQL(" AND ") if isinstance(tree, And) else sql.SQL(" OR ")
        return sql.SQL("({})").format(joint.join(compile_filter(part) for part in tree.parts))
    return _compile_condition(tree)


def range_expression(column: str) -> sql.Composable:
    """A column's number as a double: the same in conditions and in indexes, else no index serves a condition."""
    return sql.SQL("((metadata ->> {})::double precision)").format(sql.Literal(column))


def ranged_columns(filter_types: Mapping[str, FilterType]) -> list[str]:
    """The columns that get an index for ranges."""
    return [column for column, kind in filter_types.items() if kind in _RANGED][:MAX_RANGE_INDEXES]


def _compile_condition(condition: Condition) -> sql.Composable:
    column, operand = condition.column, condition.value
    match condition.operator:
        case Operator.EXISTS:
            # nulls are not stored
            exists = sql.SQL("(metadata ? {})").format(sql.Literal(column))
            return exists if operand else sql.SQL("(NOT {})").format(exists)
        case Operator.EQ | Operator.IN:
            return _one_of(column, operand)
        case Operator.NEQ | Operator.NIN:
            return sql.SQL("(NOT {})").format(_one_of(column, operand))
    bound: Any = operand
    return sql.SQL("(metadata ? {column} AND {value} {comparison} {bound})").format(
        column=sql.Literal(column),
        value=range_expression(column),
        comparison=_COMPARISONS[condition.operator],
        bound=_double(float(bound)),
    )


def _one_of(column: str, operand: Scalar | tuple[Scalar, ...]) -> sql.Composable:
    values = operand if isinstance(operand, tuple) else (operand,)
    documents = [sql.Literal(orjson.dumps({column: value}).decode()) for value in dict.fromkeys(values)]
    if not documents:
        return sql.SQL("FALSE")
    if len(documents) == 1:
        return sql.SQL("(metadata @> {}::jsonb)").format(documents[0])
    return sql.SQL("(metadata @> ANY (ARRAY[{}]::jsonb[]))").format(sql.SQL(", ").join(documents))


def _double(number: float) -> sql.Composable:
    return sql.SQL("{}::double precision").format(sql.Literal(repr(number)))
