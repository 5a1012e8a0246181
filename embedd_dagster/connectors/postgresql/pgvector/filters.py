"""Filters as SQL over the `metadata` column, and the index of each column that serves them.

A number is compared as a double and, where integers must be told apart, by its text besides. A text is compared by its hash,
which an index can hold however long the text is, and by itself. Equality is then the equality of bytes in every locale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from psycopg import sql

from embedd_dagster.core.filters import And, Condition, Filter, Operator, Or, Scalar
from embedd_dagster.core.vector_table import FilterType

MAX_INDEXES: Final = 16
"""Each makes every write dearer; conditions on further columns are found by scanning."""

_COMPARISONS: Final = {
    Operator.GT: sql.SQL(">"),
    Operator.GTE: sql.SQL(">="),
    Operator.LT: sql.SQL("<"),
    Operator.LTE: sql.SQL("<="),
}


def compile_filter(tree: Filter, filter_types: Mapping[str, FilterType]) -> sql.Composable:
    """The SQL condition of exactly the rows for which `core.filters.matches` is true; for others it is false or null.

    Values are literals in it. To be run without parameters: a `%` in a column's name would be taken for a placeholder.
    """
    if isinstance(tree, And | Or):
        if not tree.parts:
            return sql.SQL("TRUE") if isinstance(tree, And) else sql.SQL("FALSE")
        joint = sql.SQL(" AND ") if isinstance(tree, And) else sql.SQL(" OR ")
        return sql.SQL("({})").format(joint.join(compile_filter(part, filter_types) for part in tree.parts))
    return _compile_condition(tree, filter_types[tree.column])


def index_expressions(filter_types: Mapping[str, FilterType]) -> list[sql.Composable]:
    """What to index for these columns: exactly the expressions of the conditions, or no index would serve them."""
    return [_indexed(column, kind) for column, kind in filter_types.items()][:MAX_INDEXES]


def _compile_condition(condition: Condition, filter_type: FilterType) -> sql.Composable:
    column, operand = condition.column, condition.value
    match condition.operator:
        case Operator.EXISTS:  # nulls are not stored
            exists = sql.SQL("(metadata ? {})").format(sql.Literal(column))
            return exists if operand else sql.SQL("(NOT {})").format(exists)
        case Operator.EQ | Operator.IN:
            return _one_of(column, filter_type, operand)
        case Operator.NEQ | Operator.NIN:
            return sql.SQL("({} IS NOT TRUE)").format(_one_of(column, filter_type, operand))
    bound: Any = operand
    comparison = _COMPARISONS[condition.operator]
    return sql.SQL("({} {} {})").format(_double(column), comparison, _double_literal(bound))


def _one_of(column: str, filter_type: FilterType, operand: Scalar | tuple[Scalar, ...]) -> sql.Composable:
    values: tuple[Any, ...] = operand if isinstance(operand, tuple) else (operand,)
    if not values:
        return sql.SQL("FALSE")
    if filter_type is FilterType.FLOAT:
        return _any_of(_double(column), [_double_literal(value) for value in values])
    texts = [sql.Literal(str(value).lower() if isinstance(value, bool) else str(value)) for value in values]
    if filter_type is FilterType.INTEGER:
        by_index = _any_of(_double(column), [_double_literal(value) for value in values])
    else:
        by_index = _any_of(_hash(column), [sql.SQL("hashtextextended({}, 0)").format(text) for text in texts])
    # in COALESCE the planner does not take the second half for another, independent restriction
    return sql.SQL("({} AND COALESCE({}, FALSE))").format(by_index, _any_of(_text(column), texts))


def _any_of(value: sql.Composable, alternatives: list[Any]) -> sql.Composable:
    if len(alternatives) == 1:
        return sql.SQL("({} = {})").format(value, alternatives[0])
    return sql.SQL("({} = ANY (ARRAY[{}]))").format(value, sql.SQL(", ").join(alternatives))


def _indexed(column: str, filter_type: FilterType) -> sql.Composable:
    return _double(column) if filter_type in (FilterType.INTEGER, FilterType.FLOAT) else _hash(column)


def _text(column: str) -> sql.Composable:
    return sql.SQL("(metadata ->> {})").format(sql.Literal(column))


def _double(column: str) -> sql.Composable:
    return sql.SQL("({}::double precision)").format(_text(column))


def _hash(column: str) -> sql.Composable:
    return sql.SQL("hashtextextended({}, 0)").format(_text(column))


def _double_literal(number: float) -> sql.Composable:
    return sql.SQL("{}::double precision").format(sql.Literal(repr(float(number))))
