"""The filter language: what is accepted, what it means, and how a refusal reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.core.filters import MAX_CONDITIONS, MAX_DEPTH, Condition, Operator, matches, parse_filter
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ValidationFailed

TYPES = {
    "category": FilterType.KEYWORD,
    "count": FilterType.INTEGER,
    "price": FilterType.FLOAT,
    "in_stock": FilterType.BOOLEAN,
}


def test_the_example_of_the_contract() -> None:
    tree = parse_filter(
        {
            "category": {"eq": "x"},
            "price": {"gte": 10, "lte": 50},
            "in_stock": True,
            "$or": [{"count": 1}, {"count": {"gt": 5}}],
        },
        TYPES,
    )
    row = {"category": "x", "price": 10.0, "in_stock": True, "count": 1}
    assert matches(tree, row)
    assert matches(tree, {**row, "count": 6})
    for change in ({"category": "y"}, {"price": 9.99}, {"price": 50.1}, {"in_stock": False}, {"count": 2}):
        assert not matches(tree, {**row, **change})


@pytest.mark.parametrize(
    ("operator", "operand", "matching", "others"),
    [
        ("eq", 3, [3], [2, None]),
        ("neq", 3, [2, None], [3]),
        ("gt", 3, [4], [3, 2, None]),
        ("gte", 3, [3, 4], [2, None]),
        ("lt", 3, [2], [3, None]),
        ("lte", 3, [3, 2], [4, None]),
        ("in", [1, 3], [1, 3], [2, None]),
        ("in", [], [], [1, None]),
        ("nin", [1, 3], [2, None], [1, 3]),
        ("nin", [], [1, None], []),
        ("exists", True, [0], [None]),
        ("exists", False, [None], [0]),
    ],
)
def test_every_operator(operator: str, operand: Any, matching: list[Any], others: list[Any]) -> None:
    for spelling in (operator, f"${operator}", *(["$ne", "ne"] if operator == "neq" else [])):
        tree = parse_filter({"count": {spelling: operand}}, TYPES)
        for value in matching:
            assert matches(tree, {"count": value})
            assert value is not None or matches(tree, {})
        for value in others:
            assert not matches(tree, {"count": value})


def test_a_bare_value_is_eq() -> None:
    assert parse_filter({"category": "x"}, TYPES) == Condition("category", Operator.EQ, "x")


def test_an_empty_filter_matches_everything() -> None:
    assert matches(parse_filter({}, TYPES), {})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ([], "filters"),
        ("x", "filters"),
        ({"colour": 1}, "'colour'"),
        ({"category": {}}, "filters.category"),
        ({"category": {"gt": "a"}}, "'gt'"),
        ({"category": {"like": "a"}}, "'like'"),
        ({"category": 1}, "filters.category.eq"),
        ({"category": None}, "exists"),
        ({"category": {"in": "a"}}, "filters.category.in"),
        ({"category": {"in": ["a", 1]}}, "filters.category.in[1]"),
        ({"category": "a\x00"}, "filters.category.eq"),
        ({"category": "\ud800"}, "filters.category.eq"),
        ({"count": 1.5}, "filters.count.eq"),
        ({"count": True}, "filters.count.eq"),
        ({"count": 2**63}, "64 bits"),
        ({"count": float("nan")}, "filters.count.eq"),
        ({"price": "1"}, "filters.price.eq"),
        ({"price": True}, "filters.price.eq"),
        ({"price": float("inf")}, "filters.price.eq"),
        ({"price": 10**400}, "filters.price.eq"),
        ({"in_stock": 1}, "filters.in_stock.eq"),
        ({"in_stock": {"lt": True}}, "'lt'"),
        ({"in_stock": {"exists": 1}}, "filters.in_stock.exists"),
        ({"$or": {}}, "filters.$or"),
        ({"$or": []}, "filters.$or"),
        ({"$or": [1]}, "filters.$or[0]"),
        ({"$and": [{}]}, "'$and'"),
    ],
)
def test_a_refusal_names_the_field(raw: Any, named: str) -> None:
    with pytest.raises(ValidationFailed, match=r".") as refused:
        parse_filter(raw, TYPES)
    assert named in f"{refused.value.message} {refused.value.resolution}"


def test_depth_and_size_are_bounded() -> None:
    deep: dict[str, Any] = {"count": 1}
    for _ in range(MAX_DEPTH):
        deep = {"$or": [deep]}
    with pytest.raises(ValidationFailed, match="nested deeper"):
        parse_filter(deep, TYPES)
    with pytest.raises(ValidationFailed, match="conditions"):
        parse_filter({"$or": [{"count": number} for number in range(MAX_CONDITIONS + 1)]}, TYPES)
    with pytest.raises(ValidationFailed, match="conditions"):
        parse_filter({"$or": [{}] * (MAX_CONDITIONS + 1)}, TYPES)


@pytest.mark.parametrize("number", [10**400, -(10**400), 2**63])
def test_integers_that_no_column_holds(number: int) -> None:
    with pytest.raises(ValidationFailed, match="at most 64 bits"):
        parse_filter({"count": {"eq": number}}, TYPES)
    with pytest.raises(ValidationFailed, match="values"):
        parse_filter({"count": {"in": list(range(1001))}}, TYPES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["category", "count", "price", "$or", "eq", "in", "gt", "exists", "x"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(json_values, st.dictionaries(st.sampled_from(list(TYPES)), st.none(), max_size=2))
def test_any_json_is_a_filter_or_a_clear_refusal(raw: Any, metadata: dict[str, Any]) -> None:
    try:
        tree = parse_filter(raw, TYPES)
    except ValidationFailed as error:
        refusal: str | None = error.message
    else:
        refusal = None
        assert matches(tree, metadata) in (True, False)
    assert refusal is None or refusal.startswith("filters")
