"""The doubles that metadata of filter_type `float` is kept and compared as, the same in every store.

Qdrant keeps a payload as JSON text and parses it at every read and at every rebuild of a segment. Its parser (serde_json without
`float_roundtrip`) reads the digits as an integer and scales it by a power of ten. Both steps round, so a double may come back
as a neighbour, and as another one after the next rebuild. A double that comes back as itself is stable for good: only such
doubles are kept (ADR 0018).
"""

from __future__ import annotations

import math
from typing import Final

_LARGEST_POWER: Final = 308
_POWERS_OF_TEN: Final = tuple(float(f"1e{exponent}") for exponent in range(_LARGEST_POWER + 1))
_EXACT_DIGITS: Final = 15
"""So many digits have a double of their own, and between 1e-7 and 1e15 so has the power of ten that scales them."""
_EXACT_FROM: Final = 1e-7
_EXACT_BELOW: Final = 1e15


def kept_float(value: float) -> float:
    """The nearest double to this finite one that Qdrant reads back as itself; of two equally near, the one nearer to 0.

    Idempotent, and never reverses the order of two numbers. Seven in ten doubles of all sizes stay as they are; the others
    move by one unit in the last place or a few (37 at most of 200,000 measured).
    """
    if not value:
        return 0.0
    size = abs(value)
    if _EXACT_FROM <= size < _EXACT_BELOW and len(repr(size)) <= _EXACT_DIGITS + 1:
        return value
    if _is_stable(size):
        return value
    lower = upper = size
    while True:
        lower = math.nextafter(lower, 0.0)
        if _is_stable(lower):
            return math.copysign(lower, value)
        upper = math.nextafter(upper, math.inf)
        if upper < math.inf and _is_stable(upper):
            return math.copysign(upper, value)


def read_by_qdrant(text: str) -> float:
    """The double that serde_json reads from a JSON number of at most 19 digits; infinity if it refuses the number.

    Source: `f64_from_parts` of serde_json's `de.rs`, as built without the feature `float_roundtrip`.
    """
    digits, _, exponent = text.partition("e")
    whole, _, fraction = digits.partition(".")
    scale = int(exponent or 0) - len(fraction)
    number = float(int(whole + fraction))
    if scale < -_LARGEST_POWER:
        number /= _POWERS_OF_TEN[_LARGEST_POWER]
        scale += _LARGEST_POWER
    return number * _POWERS_OF_TEN[scale] if scale >= 0 else number / _POWERS_OF_TEN[-scale]


def _is_stable(size: float) -> bool:
    # Qdrant prints the shortest digits that name a double, as Python does
    return read_by_qdrant(repr(size)) == size
