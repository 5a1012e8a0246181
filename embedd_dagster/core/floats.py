"""The doubles that metadata of filter_type `float` is kept and compared as, the same in every store.

Qdrant keeps a payload as JSON. Its parser (serde_json without `float_roundtrip`) reads the digits as an integer and scales that
by a power of ten: exact while both have a double of their own, off by one unit in the last place for a tenth of all others.
Then a stored value equals neither itself in the source nor the answer that showed it. So what is kept has no more digits than
come through, of which `double precision` promises 15 (PostgreSQL's manual, 8.1.3).
"""

from __future__ import annotations

import math
from typing import Final

_MOST_DIGITS: Final = 15
_SIGNIFICAND_BELOW: Final = 9 * 10**15
"""A significand of 16 digits below has a double of its own: 2^53 is a little more."""
_EXACT_FROM: Final = 1e-7
_EXACT_BELOW: Final = 1e15
"""Between these, 16 digits are scaled by no more than 10^22, the last power of ten that has a double of its own."""
_SMALLEST: Final = 1e-300
"""Below, doubles lie too far apart to be told from their neighbours: they are kept as 0."""
_LARGEST: Final = 1.79769313486231e308


def kept_float(value: float) -> float:
    """The finite double that stands for a finite one: 16 significant digits where they come through, else 15.

    Idempotent, and never turns the order of two numbers around.
    """
    if len(repr(value)) <= _MOST_DIGITS + 1 and (is_kept_exactly(value) or not value):
        return value
    size = abs(value)
    if size < _SMALLEST:
        return 0.0
    if size > _LARGEST:
        return math.copysign(_LARGEST, value)
    rounded = f"{value:.15e}"
    if is_kept_exactly(value) and int(rounded.lstrip("-").partition("e")[0].replace(".", "")) < _SIGNIFICAND_BELOW:
        return float(rounded)
    return float(f"{value:.14e}")


def is_kept_exactly(value: float) -> bool:
    """Whether every store reads back exactly this kept double; else one that is up to two units in the last place away."""
    return not value or _EXACT_FROM <= abs(value) < _EXACT_BELOW
