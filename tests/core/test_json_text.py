"""JSON read and written: every number with its own digits, and documents that Python cannot hold as their own text."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.core.embedded_text import render_value
from embedd_dagster.core.json_text import load_json


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ('{"b": 1.10, "a": [1, 2.50, "1.10"]}', '{"a":[1,2.50,"1.10"],"b":1.10}'),
        ('{"a": 12345678901234567890.123456789}', '{"a":12345678901234567890.123456789}'),
        ('[{"a": 1e400}, {"b": -1E-400}]', '[{"a":1e400},{"b":-1E-400}]'),
        ('{"é\\"": [1.0, 1.00, null, true]}', '{"é\\"":[1.0,1.00,null,true]}'),
        ("1.10", "1.10"),
        ("[1.10, 2, null]", "1.10, 2"),
        ('{"a": 0.5}', '{"a":0.5}'),
        ("[" * 5 + "1.50" + "]" * 5, "[[[[[1.50]]]]]"),
    ],
)
def test_numbers_of_a_document_keep_their_digits(document: str, text: str) -> None:
    for has_unique_keys in (True, False):
        assert render_value(load_json(document, has_unique_keys=has_unique_keys)) == text


def test_a_name_that_stands_twice_keeps_the_document_as_it_is() -> None:
    assert load_json('{"a": 1, "a": 2}', has_unique_keys=False) == '{"a": 1, "a": 2}'


@pytest.mark.parametrize("depth", [10, 299, 301, 900, 100_000])
@pytest.mark.parametrize("number", ["1", "1.10"])
def test_a_document_of_any_depth_can_be_kept_and_written(depth: int, number: str) -> None:
    document = '{"a":[' * (depth // 2) + number + "]}" * (depth // 2)
    value = pickle.loads(pickle.dumps(load_json(document, has_unique_keys=True)))
    assert render_value(value) == document


def test_integers_of_thousands_of_digits_keep_them() -> None:
    document = '{"a":' + "9" * 5000 + "}"
    assert render_value(load_json(document, has_unique_keys=True)) == document


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_document_is_written_as_it_was_read(value: object) -> None:
    document = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    loaded = load_json(document, has_unique_keys=False)
    nested = render_value([[loaded]])
    assert nested is not None
    assert json.loads(nested, parse_float=Decimal) == [[json.loads(document, parse_float=Decimal)]]
