"""Filters as Qdrant's JSON, and the payload keys they name.

Qdrant compares a range with doubles if a field has no index, and with the bounds cut to integers if it has an integer index;
both are made to mean what `core.filters.matches` means. Bounds of integers are sent as JSON integers: Qdrant's parser reads
`9007199254740991.0` as a neighbour, and `9007199254740991` exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from qdrant_client import models

from embedd_dagster.core.filters import And, Condition, Filter, Operator, Or
from embedd_dagster.core.vector_table import FilterType

# without links of their own in the vectors' graph: see `payload_indexes`
_INDEXES: Final[dict[FilterType, models.PayloadSchemaParams]] = {
    FilterType.KEYWORD: models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, enable_hnsw=False),
    FilterType.INTEGER: models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, enable_hnsw=False),
    FilterType.FLOAT: models.FloatIndexParams(type=models.FloatIndexType.FLOAT, enable_hnsw=False),
    FilterType.BOOLEAN: models.BoolIndexParams(type=models.BoolIndexType.BOOL, enable_hnsw=False),
}
_BUCKET_INDEX: Final = models.IntegerIndexParams(
    type=models.IntegerIndexType.INTEGER, lookup=False, range=True, enable_hnsw=False
)
_UNQUOTABLE: Final = ('"', "\\")
_ESCAPES: Final = {mark: f"%{ord(mark):02X}" for mark in (*_UNQUOTABLE, "%")}
_ESCAPING: Final = str.maketrans(_ESCAPES)
_ESCAPED: Final = re.compile("|".join(_ESCAPES.values()))
_CLAUSES: Final = frozenset({"must", "should", "must_not"})
_NEVER: Final[dict[str, Any]] = {"has_id": []}
_EXACT_BELOW: Final = 2**53
"""Integers below have a double of their own."""
_MIN_INTEGER: Final = -(2**63)
_MAX_INTEGER: Final = 2**63 - 1


def payload_key(column: str) -> str:
    """The key of a column in the payload: its name, with what no JSON path of Qdrant can quote as `%22` and `%5C`.

    Names that hold such an escape already are escaped too, so that no two columns share a key.
    """
    if any(mark in column for mark in _UNQUOTABLE) or any(code in column for code in _ESCAPES.values()):
        return column.translate(_ESCAPING)
    return column


def column_name(key: str) -> str:
    """The column that `payload_key` gave this key for."""
    return _ESCAPED.sub(lambda match: chr(int(match[0][1:], 16)), key)


def payload_path(column: str) -> str:
    """The JSON path of a column's value in the payload, quoted so that dots, brackets and spaces are plain characters."""
    return f'metadata."{payload_key(column)}"'


def payload_indexes(filter_types: Mapping[str, FilterType]) -> dict[str, models.PayloadSchemaParams]:
    """The indexed fields, each without links of its own in the vectors' graph.

    Qdrant would link the points of each value, and of each range of a number, once more: that took three quarters of the
    time to build a graph, and with filters over two columns ACORN finds more (benchmarks/README.md). Nobody searches by
    bucket. A server before 1.17 does not know the setting, and builds the links.
    """
    return {"bucket": _BUCKET_INDEX} | {payload_path(column): _INDEXES[kind] for column, kind in filter_types.items()}


def bucket_filter(ranges: list[tuple[int, int]]) -> dict[str, Any]:
    """The filter of the points whose stored bucket is in one of these inclusive ranges."""
    return {"should": [{"key": "bucket", "range": {"gte": low, "lte": high}} for low, high in ranges]}


def compile_filter(
    tree: Filter, filter_types: Mapping[str, FilterType], *, max_list_values: int | None = None
) -> dict[str, Any]:
    """The Qdrant filter of exactly the points for which `core.filters.matches` is true.

    No list of values in it is longer than `max_list_values`.
    """
    return _split_lists(_as_filter(_compile(tree, filter_types)), max_list_values)


def _split_lists(condition: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """The condition with every longer list of values as several lists, of which one must match."""
    if longest is None:
        return condition
    values = condition.get("match", {}).get("any", ())
    if len(values) > longest:
        parts = [values[start : start + longest] for start in range(0, len(values), longest)]
        return {"should": [{**condition, "match": {"any": part}} for part in parts]}
    return {
        key: [_split_lists(part, longest) for part in value] if key in _CLAUSES else value
        for key, value in condition.items()
    }


def _as_filter(condition: dict[str, Any]) -> dict[str, Any]:
    return condition if condition.keys() <= _CLAUSES else {"must": [condition]}


def _compile(tree: Filter, types: Mapping[str, FilterType]) -> dict[str, Any]:
    if isinstance(tree, And):
        return {"must": [_compile(part, types) for part in tree.parts]} if tree.parts else {}
    if isinstance(tree, Or):
        return _any_of([_compile(part, types) for part in tree.parts])
    return _compile_condition(tree, types[tree.column])


def _any_of(conditions: list[dict[str, Any]]) -> dict[str, Any]:
    # Qdrant reads an empty `should` as no condition at all
    return {"should": conditions} if conditions else _NEVER


def _compile_condition(condition: Condition, filter_type: FilterType) -> dict[str, Any]:
    path = payload_path(condition.column)
    operand: Any = condition.value
    match condition.operator:
        case Operator.EXISTS:
            empty = {"is_empty": {"key": path}}
            return {"must_not": [empty]} if operand else empty
        case Operator.EQ:
            return _one_of(path, (operand,), filter_type)
        case Operator.IN:
            return _one_of(path, operand, filter_type)
        case Operator.NEQ:
            return {"must_not": [_one_of(path, (operand,), filter_type)]}
        case Operator.NIN:
            return {"must_not": [_one_of(path, operand, filter_type)]}
    return _compare(path, condition.operator, operand, filter_type)


def _one_of(path: str, values: tuple[Any, ...], filter_type: FilterType) -> dict[str, Any]:
    if not values:
        return _NEVER
    if filter_type is FilterType.FLOAT:  # Qdrant matches no floats
        return _any_of([{"key": path, "range": {"gte": value, "lte": value}} for value in dict.fromkeys(values)])
    if filter_type is FilterType.BOOLEAN:
        return _any_of([{"key": path, "match": {"value": value}} for value in dict.fromkeys(values)])
    if len(values) == 1:
        return {"key": path, "match": {"value": values[0]}}
    return {"key": path, "match": {"any": list(values)}}


def _compare(path: str, operator: Operator, operand: float, filter_type: FilterType) -> dict[str, Any]:
    compared = {"key": path, "range": {operator.value: operand}}
    if filter_type is FilterType.FLOAT or abs(operand) < _EXACT_BELOW:
        return compared
    # Beyond 2^53 several integers share a double, and an index tells them apart where the meaning does not.
    same = {"key": path, "match": {"any": _integers_rounding_to(float(operand))}}
    if operator in (Operator.GTE, Operator.LTE):
        return {"should": [compared, same]}
    return {"must": [compared], "must_not": [same]}


def _integers_rounding_to(bound: float) -> list[int]:
    centre = int(bound)
    reach = int(math.ulp(bound)) // 2 + 1
    around = range(max(centre - reach, _MIN_INTEGER), min(centre + reach, _MAX_INTEGER) + 1)
    return [value for value in around if float(value) == bound]
