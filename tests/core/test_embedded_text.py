"""Row → text: the one form of every value, and what is left out."""

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.core.embedded_text import clean_text, compose_text, metadata_value, render_value, text_hash
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType
from embedd_dagster.errors import ValueOutOfRange


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("a\x00b", "ab"),
        ("a\ud800b", "a\ufffdb"),
        (True, "true"),
        (0, "0"),
        (Decimal("19.90"), "19.90"),
        (Decimal("1E+3"), "1000"),
        (Decimal("NaN"), None),
        (0.1, "0.1"),
        (float("nan"), None),
        (float("-inf"), None),
        (date(2024, 2, 29), "2024-02-29"),
        (time(13, 37), "13:37:00"),
        (datetime(2024, 2, 29, 13, 37), "2024-02-29T13:37:00"),  # noqa: DTZ001 - a timestamp without zone
        (datetime(2024, 2, 29, 14, 37, tzinfo=timezone(timedelta(hours=1))), "2024-02-29T13:37:00Z"),
        (timedelta(hours=1, minutes=30), "PT1H30M"),
        (timedelta(days=30), "P30D"),
        (timedelta(days=-1, microseconds=-500000), "P-1DT-0.5S"),
        (timedelta(0), "PT0S"),
        (timedelta(milliseconds=1500), "PT1.5S"),
        (UUID("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"), "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        (["a", None, "b", 3], "a, b, 3"),
        ({"b": 1, "a": [1, 2]}, '{"a":[1,2],"b":1}'),
        ([{"x": Decimal("1.5")}], '[{"x":"1.5"}]'),
        (b"\x00\xff", "00ff"),
        (None, None),
    ],
)
def test_every_value_has_one_text_form(value: object, text: str | None) -> None:
    assert render_value(value) == text


@given(st.text(alphabet=st.characters(codec=None)))
def test_cleaned_text_is_always_accepted_by_stores(text: str) -> None:
    cleaned = clean_text(text)
    cleaned.encode("utf-8")
    assert "\x00" not in cleaned
    assert clean_text(cleaned) == cleaned


COLUMNS = (
    Column("title", ColumnRole.EMBEDDING, name_prefix="title: "),
    Column("body", ColumnRole.EMBEDDING),
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("A", "B"), "title: A\nB"),
        ((None, "B"), "B"),
        (("  \n", "B"), "B"),
        (("A", ""), "title: A"),
        ((None, float("nan")), ""),
        (("é\x00", 5), "title: é\n5"),
    ],
)
def test_null_and_blank_values_are_left_out_with_their_prefix(values: tuple[object, ...], text: str) -> None:
    assert compose_text(COLUMNS, values) == text


def test_text_hash_is_a_signed_64_bit_integer_that_tells_texts_apart() -> None:
    hashes = {text_hash(f"text {number}") for number in range(1000)}
    assert len(hashes) == 1000
    assert all(-(2**63) <= hashed < 2**63 for hashed in hashes)
    assert text_hash("a") == text_hash("a")


@pytest.mark.parametrize(
    ("value", "filter_type", "stored"),
    [
        (None, FilterType.KEYWORD, None),
        (date(2024, 1, 2), FilterType.KEYWORD, "2024-01-02"),
        (7, FilterType.INTEGER, 7),
        (Decimal("7"), FilterType.INTEGER, 7),
        (float("nan"), FilterType.INTEGER, None),
        (Decimal("1.25"), FilterType.FLOAT, 1.25),
        (Decimal("NaN"), FilterType.FLOAT, None),
        (float("inf"), FilterType.FLOAT, None),
        (False, FilterType.BOOLEAN, False),
    ],
)
def test_metadata_is_stored_by_its_filter_type(value: object, filter_type: FilterType, stored: object) -> None:
    assert metadata_value(value, filter_type) == stored


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, Decimal("1.5")])
def test_a_value_that_an_integer_column_cannot_hold_is_a_row_error(value: object) -> None:
    with pytest.raises(ValueOutOfRange):
        metadata_value(value, FilterType.INTEGER)


def test_timestamps_of_one_instant_have_one_text() -> None:
    instant = datetime(2024, 6, 1, 12, tzinfo=UTC)
    assert render_value(instant) == render_value(instant.astimezone(timezone(timedelta(hours=-7))))
