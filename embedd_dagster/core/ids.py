"""Ids: a prefix and 26 characters, the first 7 of them a timestamp in seconds, the others random."""

from __future__ import annotations

import secrets
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_TIME_LENGTH: Final = 7
_RANDOM_LENGTH: Final = 19  # 95 bits


def new_id(prefix: str, seconds: int) -> str:
    """A new id such as `vt_1q3k8zc…`: unguessable, and in text order by creation second.

    Only 7 characters carry the time, so that the first 8 (the seed's short form) already differ within a second.
    """
    time_part = "".join(_ALPHABET[(seconds >> shift) & 31] for shift in range(5 * (_TIME_LENGTH - 1), -1, -5))
    return f"{prefix}_{time_part}{''.join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))}"
