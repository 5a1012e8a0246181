"""Kept doubles: near the given one, in the same order, and only such as Qdrant's JSON brings back."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedd_dagster.core.floats import kept_float, read_by_qdrant

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(FINITE)
@example(0.9452706955539223)
@example(999.7677756163395)
@example(9007199254740991.0)
@example(1.7976931348623157e308)
@example(-5e-324)
@example(9.523299828698871e-212)
@example(6.16078396544839e-12)
@example(2.2250738585072014e-308)
def test_the_kept_double_is_near_and_is_kept_as_it_is(value: float) -> None:
    kept = kept_float(value)
    assert math.isclose(kept, value, rel_tol=1e-13, abs_tol=5e-322)
    assert kept_float(kept) == kept


@given(FINITE)
@example(9.523299828698871e-212)
@example(6.16078396544839e-12)
@example(1.7976931348623157e308)
def test_the_kept_double_is_read_back_as_itself_after_any_number_of_rebuilds(value: float) -> None:
    kept = kept_float(value)
    assert read_by_qdrant(repr(kept)) == kept


@given(FINITE, FINITE)
@example(1.000000000000004, 1.0000000000000047)
@example(0.1 + 0.2, 0.3)
def test_order_is_never_reversed(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert kept_float(low) <= kept_float(high)


@given(FINITE, st.integers(-64, 64))
def test_order_of_close_neighbours_is_never_reversed(value: float, units: int) -> None:
    near = value + units * math.ulp(value)
    if math.isfinite(near):
        low, high = sorted((value, near))
        assert kept_float(low) <= kept_float(high)


@pytest.mark.parametrize(
    "value", [0.0, 19.9, 0.1, 1 / 3, 51.477928, 1_700_000_000.123456, 1e20, -1.5, 123456789012345.0, 1e-300]
)
def test_usual_numbers_stay_as_they_are(value: float) -> None:
    assert kept_float(value) == value


def test_negative_zero_is_zero() -> None:
    assert math.copysign(1.0, kept_float(-0.0)) == 1.0


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("0.1", 0.1),
        ("1e308", 1e308),
        ("9007199254740991.0", 9007199254740990.0),
        ("5e-324", 5e-324),
        ("18e307", math.inf),
    ],
)
def test_numbers_are_read_as_serde_json_reads_them(text: str, read: float) -> None:
    assert read_by_qdrant(text) == read
