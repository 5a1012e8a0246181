"""Ids: a prefix and 26 characters, the first 6 of them a timestamp in seconds, the others random."""

from __future__ import annotations

import secrets
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_EPOCH: Final = 1_577_836_800  # 2020-01-01: so 30 bits of seconds last until 2054
_TIME_LENGTH: Final = 6
_RANDOM_LENGTH: Final = 20  # 100 bits


def new_id(prefix: str, seconds: int) -> str:
    """A new id such as `vt_1q3k8zc…`: unguessable, and in text order by creation second.

    Only 6 characters carry the time, so that the first 8 (the short form of an id) already differ within a second, by one
    in a thousand; where they do not, the catalog takes another id.
    """
    time_part = "".join(
        _ALPHABET[((seconds - _EPOCH) >> shift) & 31] for shift in range(5 * (_TIME_LENGTH - 1), -1, -5)
    )
    return f"{prefix}_{time_part}{''.join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))}"
