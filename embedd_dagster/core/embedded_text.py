"""Row → embedded text, and row → metadata: the one text form of every value, the same from every source.

===================  =====================================================================================
value                text
===================  =====================================================================================
text                 itself; NUL is dropped, a lone surrogate becomes U+FFFD
boolean              ``true`` / ``false``
integer, numeric     digits, no exponent, the scale kept: ``19.90``
floating point       shortest form that reads back the same: ``0.1``; NaN and infinities count as null
date, time           ISO 8601: ``2024-02-29``, ``13:37:00``
timestamp            ISO 8601, one with a zone in UTC: ``2024-02-29T13:37:00Z``
interval             ISO 8601, months, days and times apart: ``P1M``, ``P30D``, ``PT1H30M``
UUID                 lower case with hyphens
array of scalars     the elements, joined by ``, ``; nulls left out
JSON, other arrays   compact JSON, keys sorted, numbers with the digits they have: ``1.10``
binary               hexadecimal
===================  =====================================================================================
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

from embedd_dagster.core.floats import kept_float
from embedd_dagster.core.json_text import dump_json
from embedd_dagster.core.vector_table import Column, FilterType
from embedd_dagster.errors import MetadataTooLarge, ValueOutOfRange

MAX_INTEGER = 2**63 - 1
MAX_METADATA_LENGTH: Final = 2**20
"""Characters of a row's metadata, all columns together. It is for filters: a store may refuse a point of 32 MB, and with it its
whole batch."""


def clean_text(text: str) -> str:
    """The text without what stores and providers refuse: NUL dropped, lone surrogates replaced."""
    if "\x00" in text:
        text = text.replace("\x00", "")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def render_value(value: Any) -> str | None:  # noqa: C901, PLR0911, PLR0912 - one table of types, best read at once
    """The value's one text form (see the module), or None for null, NaN and infinities."""
    if value is None:
        return None
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return f"{value:f}" if value.is_finite() else None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            return value.isoformat()
        return value.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return _render_interval(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, list | tuple) and not any(isinstance(item, list | tuple | dict) for item in value):
        return ", ".join(text for item in value if (text := render_value(item)) is not None)
    if isinstance(value, list | tuple | dict):
        return clean_text(dump_json(value, render_value))
    return clean_text(str(value))


def _render_interval(value: timedelta) -> str:
    """An interval of these days and this time in ISO 8601: `P-1DT2H0.5S`; a negative one has the sign at each number."""
    sign = "-" if value < timedelta(0) else ""
    value = abs(value)
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06d}".rstrip("0") if value.microseconds else ""
    days = f"{sign}{value.days}D" if value.days else ""
    times = "".join(f"{sign}{number}{unit}" for number, unit in ((hours, "H"), (minutes, "M")) if number)
    if seconds or fraction:
        times += f"{sign}{seconds}{fraction}S"
    return f"P{days}T{times}" if times else f"P{days or 'T0S'}"


def compose_text(columns: Sequence[Column], values: Sequence[Any]) -> str:
    """The text of a row: each value behind its `name_prefix`, joined by newlines; "" where there is nothing to embed.

    `columns` are the embedding columns in their order (`VectorConfiguration.embedding_columns`), `values` correspond to
    them. Null and blank values are left out with their prefix.
    """
    parts = []
    for column, value in zip(columns, values, strict=True):
        text = value if type(value) is str and "\x00" not in value and value.isascii() else render_value(value)
        if text and not text.isspace():
            parts.append(f"{column.name_prefix}{text}" if column.name_prefix else text)
    return "\n".join(parts)


def text_hash(text: str) -> int:
    """A signed 64-bit hash of an embedded text (BLAKE2b): equal texts with one model and dimensions share a vector."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def text_hashes(texts: Sequence[str]) -> list[int]:
    """The `text_hash` of each."""
    digests = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return list(struct.unpack(f"<{len(texts)}q", digests))


MetadataValue = str | int | float | bool | None


def metadata_value(value: Any, filter_type: FilterType) -> MetadataValue:
    """The value as it is stored and filtered by, or None for null. Raises ValueOutOfRange where the type cannot hold it."""
    return None if value is None else metadata_reader(filter_type)(value)


def metadata_reader(filter_type: FilterType) -> Callable[[Any], MetadataValue]:
    """What makes the `metadata_value` of a value that is not null: for those who do it a million times."""
    return _METADATA_READERS[filter_type]


def check_metadata_length(length: int) -> None:
    """Raises MetadataTooLarge for more characters than a row's metadata may have."""
    if length > MAX_METADATA_LENGTH:
        raise MetadataTooLarge(
            f"The metadata is longer than {MAX_METADATA_LENGTH:,} characters, all columns together: shorten it in the source,"
            " or take the longest metadata column out of the vector table."
        )


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueOutOfRange("A value is neither true nor false, as filter_type `boolean` requires.")
    return value


def _finite_number(value: Any) -> float | None:
    try:
        number = float(value)
    except ValueError:
        raise ValueOutOfRange("A value is not a number, as filter_type `float` requires.") from None
    return kept_float(number) if math.isfinite(number) else None


def _whole_number(value: Any) -> int | None:
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    whole = int(value) if isinstance(value, int | float | Decimal) else None
    if whole is None or whole != value or not -MAX_INTEGER - 1 <= whole <= MAX_INTEGER:
        raise ValueOutOfRange("A value is not a whole number of at most 64 bits, as filter_type `integer` requires.")
    return whole


_METADATA_READERS: Final[dict[FilterType, Callable[[Any], MetadataValue]]] = {
    FilterType.KEYWORD: render_value,
    FilterType.BOOLEAN: _truth,
    FilterType.FLOAT: _finite_number,
    FilterType.INTEGER: _whole_number,
}
