"""The filter language: JSON → tree, checked against the metadata columns; `matches` is the reference meaning.

Every store must return exactly the rows for which `matches` is true. A null or absent value matches only
`exists: false`, `neq` and `nin`. Range comparisons are made as IEEE doubles, equality exactly; a float is
compared as it is kept (`core.floats`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from embedd_dagster.core.floats import kept_float
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ValidationFailed

MAX_DEPTH: Final = 8
MAX_CONDITIONS: Final = 200
MAX_LIST_VALUES: Final = 1000
MAX_KEYWORD_LENGTH: Final = 10_000

Scalar = str | int | float | bool


class Operator(StrEnum):
    """What a condition compares."""

    EQ = "eq"
    NEQ = "neq"
    GT = "gt"
    GTE = "gte"
    LT = "lt"
    LTE = "lte"
    IN = "in"
    NIN = "nin"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class Condition:
    """One column against one value: a scalar, a tuple for `in` and `nin`, a bool for `exists`."""

    column: str
    operator: Operator
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class And:
    """Every part holds; without parts, always."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one part holds."""

    parts: tuple[Filter, ...]


Filter = Condition | And | Or

_RANGE: Final = frozenset({Operator.GT, Operator.GTE, Operator.LT, Operator.LTE})
_EQUALITY: Final = frozenset({Operator.EQ, Operator.NEQ, Operator.IN, Operator.NIN, Operator.EXISTS})
OPERATORS: Final[dict[FilterType, frozenset[Operator]]] = {
    FilterType.KEYWORD: _EQUALITY,
    FilterType.BOOLEAN: _EQUALITY,
    FilterType.INTEGER: _EQUALITY | _RANGE,
    FilterType.FLOAT: _EQUALITY | _RANGE,
}
_SPELLINGS: Final = {
    **{operator.value: operator for operator in Operator},
    **{f"${operator.value}": operator for operator in Operator},
    "$ne": Operator.NEQ,
    "ne": Operator.NEQ,
}


def parse_filter(raw: Any, filter_types: Mapping[str, FilterType]) -> Filter:
    """The tree of a request's `filters`. Raises ValidationFailed, naming the field and what is accepted."""
    budget = _Budget()
    return _parse_object(raw, filter_types, "filters", 1, budget)


@dataclass(slots=True)
class _Budget:
    conditions: int = 0

    def take(self) -> None:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise ValidationFailed(f"filters: at most {MAX_CONDITIONS} conditions are accepted.")


def _parse_object(raw: Any, types: Mapping[str, FilterType], where: str, depth: int, budget: _Budget) -> Filter:
    if depth > MAX_DEPTH:
        raise ValidationFailed(f"filters: nested deeper than {MAX_DEPTH} levels.")
    if not isinstance(raw, dict):
        raise ValidationFailed(f'{where}: an object is expected, such as {{"category": {{"eq": "x"}}}}.')
    parts: list[Filter] = []
    for name, value in raw.items():
        if name == "$or":
            if not isinstance(value, list) or not value:
                raise ValidationFailed(f"{where}.$or: a list of at least one filter object is expected.")
            nested = []
            for index, item in enumerate(value):
                budget.take()  # an empty one is a condition too
                nested.append(_parse_object(item, types, f"{where}.$or[{index}]", depth + 1, budget))
            parts.append(Or(tuple(nested)))
        elif name not in types:
            known = ", ".join(sorted(types)) or "none"
            raise ValidationFailed(
                f"{where}: {name!r} is not a metadata column of this vector table. Metadata columns: {known}."
            )
        else:
            parts.extend(_parse_field(name, value, types[name], f"{where}.{name}", budget))
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _parse_field(column: str, raw: Any, filter_type: FilterType, where: str, budget: _Budget) -> list[Condition]:
    if not isinstance(raw, dict):
        raw = {"eq": raw}
    if not raw:
        raise ValidationFailed(f"{where}: an operator is expected: {_accepted(filter_type)}.")
    conditions = []
    for spelling, value in raw.items():
        budget.take()
        operator = _SPELLINGS.get(spelling)
        if operator is None or operator not in OPERATORS[filter_type]:
            raise ValidationFailed(
                f"{where}: operator {spelling!r} is not accepted for a {filter_type} column; accepted: {_accepted(filter_type)}."
            )
        conditions.append(
            Condition(column, operator, _parse_operand(operator, value, filter_type, f"{where}.{spelling}"))
        )
    return conditions


def _accepted(filter_type: FilterType) -> str:
    return ", ".join(operator for operator in Operator if operator in OPERATORS[filter_type])


def _parse_operand(operator: Operator, raw: Any, filter_type: FilterType, where: str) -> Scalar | tuple[Scalar, ...]:
    if operator is Operator.EXISTS:
        if not isinstance(raw, bool):
            raise ValidationFailed(f"{where}: true or false is expected.")
        return raw
    if operator in (Operator.IN, Operator.NIN):
        if not isinstance(raw, list):
            raise ValidationFailed(f"{where}: a list is expected.")
        if len(raw) > MAX_LIST_VALUES:
            raise ValidationFailed(f"{where}: at most {MAX_LIST_VALUES} values are accepted.")
        return tuple(_parse_scalar(item, filter_type, f"{where}[{index}]") for index, item in enumerate(raw))
    return _parse_scalar(raw, filter_type, where)


def _parse_scalar(raw: Any, filter_type: FilterType, where: str) -> Scalar:
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if filter_type is FilterType.KEYWORD and isinstance(raw, str):
        if len(raw) > MAX_KEYWORD_LENGTH:
            raise ValidationFailed(f"{where}: a text of at most {MAX_KEYWORD_LENGTH} characters is accepted.")
        if "\x00" in raw or any("\ud800" <= character <= "\udfff" for character in raw):
            raise ValidationFailed(f"{where}: the text holds a NUL or a lone surrogate, which no stored value has.")
        return raw
    if filter_type is FilterType.BOOLEAN and isinstance(raw, bool):
        return raw
    if filter_type is FilterType.FLOAT and is_number:
        try:
            number = float(raw)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return kept_float(number)
    if filter_type is FilterType.INTEGER and is_number and (isinstance(raw, int) or raw.is_integer()):
        if -(2**63) <= raw < 2**63:
            return int(raw)
        raise ValidationFailed(f"{where}: an integer of at most 64 bits is accepted.")
    expected = {
        "keyword": "a text",
        "boolean": "true or false",
        "float": "a finite number",
        "integer": "a whole number",
    }
    hint = ' For "has no value" use {"exists": false}.' if raw is None else ""
    raise ValidationFailed(
        f"{where}: {expected[filter_type]} is expected, as the column's filter_type is {filter_type}.{hint}"
    )


def matches(tree: Filter, metadata: Mapping[str, Any]) -> bool:
    """Whether a row with this metadata is in the filter's answer: the reference that every store is tested against."""
    if isinstance(tree, And):
        return all(matches(part, metadata) for part in tree.parts)
    if isinstance(tree, Or):
        return any(matches(part, metadata) for part in tree.parts)
    return _holds(tree, metadata.get(tree.column))


def _holds(condition: Condition, value: Any) -> bool:  # noqa: PLR0911 - one line an operator
    operand = condition.value
    match condition.operator:
        case Operator.EXISTS:
            return (value is not None) is operand
        case Operator.NEQ:
            return value is None or value != operand
        case Operator.NIN:
            return value is None or value not in operand  # type: ignore[operator]
        case _ if value is None:
            return False
        case Operator.EQ:
            return bool(value == operand)
        case Operator.IN:
            return value in operand  # type: ignore[operator]
        case Operator.GT:
            return float(value) > float(operand)  # type: ignore[arg-type]
        case Operator.GTE:
            return float(value) >= float(operand)  # type: ignore[arg-type]
        case Operator.LT:
            return float(value) < float(operand)  # type: ignore[arg-type]
        case _:
            return float(value) <= float(operand)  # type: ignore[arg-type]
