"""Vectors at length 1, so that every store and every index gives the same order; and those that have no direction."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from embedd_dagster.core.rows import Vectors

_TOLERANCE: Final = 1e-5
"""Of the square of a length that counts as 1: such vectors stay as they are, to the bit."""
_SAFE_SQUARES: Final = (1e-24, 1e24)
"""Squares between these lose no precision in float32."""
_SHORTEST: Final = float(np.finfo(np.float32).tiny)
"""Below, float32 loses digits, and with them the direction."""


def to_unit_length(vectors: Vectors) -> tuple[Vectors, NDArray[np.bool_] | None]:
    """The vectors (n, dimensions) at length 1, and a mask of those that have a direction, or None if all have one.

    A vector has no direction if it holds NaN or Infinity, if all its numbers are 0, or if it is shorter than the smallest
    normal float32. It becomes NaN. The given array may be changed: a copy costs as much as the rest.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    if np.all(np.abs(squares - 1) < _TOLERANCE):
        return vectors, None
    if np.all((squares > _SAFE_SQUARES[0]) & (squares < _SAFE_SQUARES[1])):
        factors = (1 / np.sqrt(squares))[:, np.newaxis]
        return np.multiply(vectors, factors, out=vectors if vectors.flags.writeable else None), None
    return _by_doubles(vectors)


def _by_doubles(vectors: Vectors) -> tuple[Vectors, NDArray[np.bool_] | None]:
    # the square of no float32 overflows a double
    wide = vectors.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    usable = np.isfinite(lengths) & (lengths >= _SHORTEST)
    lengths[~usable] = np.nan
    with np.errstate(invalid="ignore"):
        unit = (wide / lengths[:, np.newaxis]).astype(np.float32)
    return unit, None if usable.all() else usable
