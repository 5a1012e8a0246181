"""Primary keys: the Python types they have, their one text form, and the point ids made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date, datetime
from decimal import Decimal
from hashlib import sha1
from typing import Final
from uuid import UUID, uuid5

Key = int | str | Decimal | UUID | datetime | date
"""A primary key as the source's driver gives it. Timestamps with a zone are in UTC."""

_POINT_NAMESPACE: Final = UUID("8b0f6a52-3a5e-5f0e-9a34-6d1f6f6e6264")


def encode_key(key: Key) -> str:
    """The key as type-tagged text: `i:42`, `s:abc`. Equal keys of the source have equal texts, others never."""
    if isinstance(key, bool):
        raise TypeError("a boolean cannot be a primary key")
    if isinstance(key, int):
        return f"i:{key}"
    if isinstance(key, str):
        return f"s:{key}"
    if isinstance(key, Decimal):
        return f"n:{_plain(key)}"
    if isinstance(key, UUID):
        return f"u:{key}"
    if isinstance(key, datetime):
        return f"t:{key.isoformat()}"
    if isinstance(key, date):
        return f"d:{key.isoformat()}"
    raise TypeError(f"{type(key).__name__} cannot be a primary key type")


def _plain(key: Decimal) -> str:
    """Digits without exponent or trailing zeros: 1.0 and 1.00 are one key to the database.

    Not `Decimal.normalize`: that rounds to the context's 28 digits.
    """
    if not key.is_finite():
        return str(key)
    digits = f"{key:f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits


_DECODERS: Final[dict[str, Callable[[str], Key]]] = {
    "i": int,
    "s": str,
    "n": Decimal,
    "u": UUID,
    "t": datetime.fromisoformat,
    "d": date.fromisoformat,
}


def decode_key(text: str) -> Key:
    """The key that `encode_key` gave this text for. Raises ValueError for any other text."""
    tag, separator, rest = text.partition(":")
    decoder = _DECODERS.get(tag)
    if not separator or decoder is None:
        raise ValueError("not an encoded key")
    try:
        return decoder(rest)
    except ArithmeticError as error:  # decimal.InvalidOperation
        raise ValueError("not an encoded key") from error


def render_key(key: Key) -> int | float | str:
    """The key as a JSON value: a number if JSON can hold it exactly, otherwise its text."""
    if isinstance(key, int | str):
        return key
    if isinstance(key, Decimal):
        if not key.is_finite():
            return str(key)
        if key == key.to_integral_value():
            return int(key)
        as_float = float(key)
        return as_float if Decimal(repr(as_float)) == key else _plain(key)
    if isinstance(key, UUID):
        return str(key)
    return key.isoformat().replace("+00:00", "Z")  # as the API writes every other timestamp


def point_id(vector_table_id: str, encoded_key: str, ordinal: int = 0) -> UUID:
    """The id of a row's point: UUIDv5 (RFC 9562) of the vector table, the type-tagged key, and the point's ordinal."""
    return uuid5(_POINT_NAMESPACE, f"{vector_table_id}/{_point_name(encoded_key, ordinal)}")


def _point_name(encoded_key: str, ordinal: int) -> str:
    # no encoded key begins with a digit, so no two pairs have one name; the first point has the name of its row
    return f"{ordinal}/{encoded_key}" if ordinal else encoded_key


def point_ids(vector_table_id: str, encoded_keys: Iterable[str], ordinals: Iterable[int] | None = None) -> list[str]:
    """The text of each point's `point_id`, in a third of the time: without a UUID object per row.

    Without ordinals: of the first point of each row.
    """
    table = sha1(_POINT_NAMESPACE.bytes + f"{vector_table_id}/".encode(), usedforsecurity=False)
    names = encoded_keys if ordinals is None else map(_point_name, encoded_keys, ordinals)
    ids = []
    for name in names:
        point = table.copy()
        point.update(name.encode())
        text = point.hexdigest()
        variant = "89ab"[int(text[16], 16) & 3]
        ids.append(f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}")
    return ids
