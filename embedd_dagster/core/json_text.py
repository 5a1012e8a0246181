"""JSON documents: read without changing a number, and written in their one text form.

Python's own reader makes a float of every number with a fraction or an exponent. `12345678901234567890.5` and `1.10` would be
other numbers, or other digits, afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from secrets import token_hex
from typing import Any, Final

_MAX_DEPTH: Final = 300
"""Of nested lists and objects. Python's pickle and JSON writer fail at some 1,000 less what is on the stack already."""
_MAX_INTEGER_DIGITS: Final = 4_000
"""Python refuses to read or write integers of more than 4,300."""


_MARK: Final = token_hex(16)
"""Stands for a JsonNumber while Python's encoder writes a document; no document can have it."""


@dataclass(frozen=True, slots=True)
class JsonNumber:
    """A number of a document that Python's own types would write otherwise."""

    digits: str

    def __str__(self) -> str:
        return self.digits


def load_json(document: str, *, has_unique_keys: bool) -> Any:
    """The document; its text as it is where that tells more: a name twice in one object, or hundreds of levels.

    `has_unique_keys` saves the look for such names, which JSON that a source keeps parsed never has.
    """
    try:
        try:
            value = (_DECODER if has_unique_keys else _EXACT_DECODER).decode(document)
        except ValueError:  # an integer of thousands of digits
            value = _EXACT_DECODER.decode(document)
    except (ValueError, RecursionError):
        return document
    if document.count("[") + document.count("{") > _MAX_DEPTH and _is_deep(value):
        return document
    return value


def dump_json(value: Any, default: Callable[[Any], Any]) -> str:
    """Compact JSON with sorted keys; `default` gives what takes the place of a value that JSON does not know."""
    numbers: list[str] = []

    def substitute(item: Any) -> Any:
        if type(item) is not JsonNumber:
            return default(item)
        numbers.append(item.digits)
        return _MARK

    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=substitute)
    if not numbers:
        return text
    return "".join(chain.from_iterable(zip(text.split(f'"{_MARK}"'), [*numbers, ""], strict=True)))


def _number(digits: str) -> float | JsonNumber:
    number = float(digits)
    return number if repr(number) == digits else JsonNumber(digits)


def _integer(digits: str) -> int | JsonNumber:
    return JsonNumber(digits) if digits == "-0" or len(digits) > _MAX_INTEGER_DIGITS else int(digits)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _is_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            return True
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return False


_DECODER: Final = json.JSONDecoder(parse_float=_number)
_EXACT_DECODER: Final = json.JSONDecoder(parse_float=_number, parse_int=_integer, object_pairs_hook=_unique_names)
