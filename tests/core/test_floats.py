"""Kept doubles: near the given one, in the same order, and only such as Qdrant's JSON brings back."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedd_dagster.core.floats import is_kept_exactly, kept_float

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def read_by_serde_json(text: str) -> float:
    """Its default algorithm: the digits as one integer, scaled by a power of ten."""
    digits, _, exponent = text.partition("e")
    whole, _, fraction = digits.partition(".")
    scale = int(exponent or 0) - len(fraction)
    significand = float(int(whole + fraction))
    return significand * 10.0**scale if scale >= 0 else significand / 10.0**-scale


@given(FINITE)
@example(0.9452706955539223)
@example(999.7677756163395)
@example(9007199254740991.0)
@example(1.7976931348623157e308)
@example(-5e-324)
def test_the_kept_double_is_near_and_is_kept_as_it_is(value: float) -> None:
    kept = kept_float(value)
    assert math.isclose(kept, value, rel_tol=5e-15, abs_tol=1e-300)
    assert kept_float(kept) == kept


@given(FINITE, FINITE)
@example(1.000000000000004, 1.0000000000000047)
@example(0.1 + 0.2, 0.3)
def test_order_is_never_turned_around(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert kept_float(low) <= kept_float(high)


@given(st.floats(1e-7, 1e15, exclude_max=True) | st.floats(0, 1).filter(lambda value: value >= 1e-7))
@example(0.9452706955539223)
@example(-13210.293572787423)
def test_what_is_kept_exactly_comes_through_the_parser(value: float) -> None:
    kept = kept_float(value)
    assert is_kept_exactly(kept) or kept == 1e15
    assert read_by_serde_json(repr(kept)) == kept


@given(FINITE.map(abs).filter(lambda value: value >= 1e-290))
def test_neighbours_are_further_apart_than_a_parser_errs(value: float) -> None:
    kept = kept_float(value)
    if not is_kept_exactly(kept):
        for units in (-4, -3, -2, -1, 1, 2, 3, 4):
            near = kept + units * math.ulp(kept)
            assert math.isinf(near) or kept_float(near) != near


@pytest.mark.parametrize(
    "value", [0.0, 19.9, 0.1, 1 / 3, 51.477928, 1_700_000_000.123456, 1e20, -1.5, 123456789012345.0, 1e-300]
)
def test_usual_numbers_stay_as_they_are(value: float) -> None:
    assert kept_float(value) == value
