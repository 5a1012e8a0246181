"""Primary keys: one text form, and a point id that no other key has."""

from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.core.keys import Key, decode_key, encode_key, point_id, point_ids, render_key

keys = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20),
    st.decimals(allow_nan=False, allow_infinity=False, places=4),
    st.uuids(),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.just(UTC)),
)


@given(keys)
def test_a_key_survives_its_text(key: Key) -> None:
    decoded = decode_key(encode_key(key))
    assert decoded == key
    assert type(decoded) is type(key)


@given(keys, keys)
def test_only_equal_keys_of_one_type_share_a_text(left: Key, right: Key) -> None:
    same = type(left) is type(right) and left == right
    assert (encode_key(left) == encode_key(right)) is same
    assert (point_id("vt_1", encode_key(left)) == point_id("vt_1", encode_key(right))) is same


def test_a_numeric_key_is_the_same_with_more_zeros() -> None:
    assert encode_key(Decimal("1.0")) == encode_key(Decimal("1.00")) == "n:1"
    assert encode_key(Decimal("1E+2")) == "n:100"


@pytest.mark.parametrize("text", ["", "i", "i:", "i:x", "n:x", "u:zz", "d:2024", "x:1", "42"])
def test_other_text_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_key(text)


@pytest.mark.parametrize("key", [True, 1.5, b"x"])
def test_other_types_are_no_keys(key: object) -> None:
    with pytest.raises(TypeError):
        encode_key(key)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (42, 42),
        ("a", "a"),
        (Decimal("5"), 5),
        (Decimal("1.5"), 1.5),
        (Decimal("0.10000000000000000000001"), "0.10000000000000000000001"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (date(2024, 1, 2), "2024-01-02"),
        (datetime(2024, 1, 2, 3, tzinfo=UTC), "2024-01-02T03:00:00Z"),
        (datetime.fromisoformat("2024-01-02T03:04:05.000600"), "2024-01-02T03:04:05.000600"),
    ],
)
def test_a_key_is_shown_in_the_sources_type(key: Key, shown: object) -> None:
    assert render_key(key) == shown
    assert type(render_key(key)) is type(shown)


def test_one_key_in_two_vector_tables_has_two_point_ids() -> None:
    assert point_id("vt_1", "i:1") != point_id("vt_2", "i:1")


@given(st.lists(keys, max_size=3))
def test_point_ids_are_the_texts_of_point_id(some: list[Key]) -> None:
    encoded = [encode_key(key) for key in some]
    assert point_ids("vt_1", encoded) == [str(point_id("vt_1", key)) for key in encoded]


def test_each_point_of_a_row_has_its_own_id() -> None:
    ids = point_ids("vt_1", ["i:1", "i:1", "i:2"], [0, 1, 1])
    assert ids == [str(point_id("vt_1", "i:1")), str(point_id("vt_1", "i:1", 1)), str(point_id("vt_1", "i:2", 1))]
    assert len(set(ids)) == 3
