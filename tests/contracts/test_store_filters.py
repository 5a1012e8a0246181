"""Every store returns exactly the rows for which `core.filters.matches` is true, for any filter over any rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.connectors.registry import open_platform_store
from embedd_dagster.core.embedded_text import metadata_value
from embedd_dagster.core.filters import OPERATORS, And, Condition, Filter, Operator, Or, matches
from embedd_dagster.core.floats import kept_float
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.protocols.store import SearchRequest, Store
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.support.toy_connector.store import SetsInMemory, ToyStore

ROW_COUNT = 400
COLUMNS: dict[str, FilterType] = {
    "keyword": FilterType.KEYWORD,
    'key "word".[]%s': FilterType.KEYWORD,
    "integer": FilterType.INTEGER,
    "inte.ger": FilterType.INTEGER,
    "float": FilterType.FLOAT,
    "100% float": FilterType.FLOAT,
    "boolean": FilterType.BOOLEAN,
}
# Few values, so that rows and operands meet, and those at which types break.
VALUES: dict[FilterType, list[Any]] = {
    FilterType.KEYWORD: ["", "a", "A", "a ", "é", "é", "null", "true", "1", "%", "'", '"', "\\", "a\nb", "𝄞"],
    FilterType.INTEGER: [
        0, 1, -1, 2, 7, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2**53 + 3, -(2**53) - 1, -(2**53),
        9007199254740990, 1799999999999999, 1800000000000001, 1798761600000001,
        2**62 + 1, 2**62, 2**62 + 256, 2**63 - 1, 2**63 - 512, 2**63 - 513, -(2**63), -(2**63) + 512, -(2**63) + 513,
    ],
    FilterType.FLOAT: [
        0.0, -0.0, 0.1, 0.1 + 2**-55, 1.0, -1.5, 3.0, 1e20, 1e-300, 5e-324, 1.7976931348623157e308, 2.0**53, -1e308, 1 / 3,
        # Qdrant reads back another double than it was given for all of these
        6.16078396544839e-12, 9.523299828698871e-212, 1.4916681462400413e-154,
        -13210.293572787423, 0.9452706955539223, 9876543210123457.0, 1.23456789012345e-30, 1.23456789012346e-30,
    ],
    FilterType.BOOLEAN: [True, False],
}  # fmt: skip


class Loaded(NamedTuple):
    stores: dict[str, tuple[Store, VectorSet]]
    rows: list[dict[str, Any]]
    query: np.ndarray

    def __repr__(self) -> str:  # Hypothesis shows it with every failure
        return "loaded"


@pytest.fixture(scope="session")
def loaded(postgres: EmbeddedPostgres, qdrant_url: str) -> Iterator[Loaded]:
    """The same rows in every store, loaded once: absent values, nulls, the edges of every type."""
    rng = np.random.default_rng(11)
    rows = []
    for _ in range(ROW_COUNT):
        row: dict[str, Any] = {}
        for column, kind in COLUMNS.items():
            choice = rng.integers(0, 10)
            if choice == 0:
                row[column] = None
            elif choice > 1:
                row[column] = metadata_value(VALUES[kind][rng.integers(0, len(VALUES[kind]))], kind)
        rows.append(row)
    vectors = rng.standard_normal((ROW_COUNT, 4)).astype(np.float32)
    points = PointBatch(
        keys=list(range(ROW_COUNT)), texts=["t"] * ROW_COUNT, metadata=rows, row_hashes=[0] * ROW_COUNT,
        text_hashes=[0] * ROW_COUNT, buckets=[0] * ROW_COUNT, vectors=vectors,
    )  # fmt: skip
    name = f"filters_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    parts = conninfo_to_dict(postgres.url(name))
    credentials = {"host": parts["host"], "port": int(parts["port"] or 0), "database": name}
    credentials |= {"user": parts["user"], "password": parts["password"]}
    vector_table_id = f"vt_{uuid4().hex[:26]}"
    vector_set = VectorSet(vector_table_id, 1, f"{vector_table_id[:11]}_f", 4, COLUMNS, "integer")
    with QdrantStore(qdrant_url) as qdrant, open_platform_store("postgresql", credentials) as pgvector:
        stores: dict[str, Store] = {"qdrant": qdrant, "pgvector": pgvector, "toy": ToyStore(SetsInMemory())}
        for store in stores.values():
            store.create(vector_set)
            store.upsert(vector_set, points)
            store.finish_load(vector_set)
        yield Loaded({key: (store, vector_set) for key, store in stores.items()}, rows, vectors[0])
        qdrant.drop(vector_table_id, 1)


def conditions() -> st.SearchStrategy[Condition]:
    def of(column: str) -> st.SearchStrategy[Condition]:
        kind = COLUMNS[column]
        value = st.sampled_from(VALUES[kind])
        if kind is FilterType.INTEGER:
            value = value | st.integers(-(2**63), 2**63 - 1) | value.flatmap(_near)
        if kind is FilterType.FLOAT:
            value = (value | st.floats(allow_nan=False, allow_infinity=False)).map(kept_float)
        if kind is FilterType.KEYWORD:
            value = value | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=3)

        def with_operator(operator: Operator) -> st.SearchStrategy[Condition]:
            operand: st.SearchStrategy[Any] = value
            if operator is Operator.EXISTS:
                operand = st.booleans()
            elif operator in (Operator.IN, Operator.NIN):
                operand = st.lists(value, max_size=6).map(tuple)
            return operand.map(lambda chosen: Condition(column, operator, chosen))

        return st.sampled_from(sorted(OPERATORS[kind])).flatmap(with_operator)

    return st.sampled_from(sorted(COLUMNS)).flatmap(of)


def _near(value: int) -> st.SearchStrategy[int]:
    return st.integers(max(-(2**63), value - 600), min(2**63 - 1, value + 600))


def filters() -> st.SearchStrategy[Filter]:
    def extend(inner: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
        parts = st.lists(inner, max_size=3).map(tuple)
        return parts.map(And) | parts.map(Or)

    return st.recursive(conditions(), extend, max_leaves=6)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=filters())
@example(tree=Or(()))
@example(tree=And(()))
@example(tree=And((Or(()), Condition("boolean", Operator.EXISTS, True))))
@example(tree=Condition("keyword", Operator.NIN, ()))
@example(tree=Condition("keyword", Operator.IN, ()))
@example(tree=Condition("integer", Operator.GT, 2**53))
@example(tree=Condition("integer", Operator.LTE, 2**63 - 1))
@example(tree=Condition("integer", Operator.LT, 2**63 - 1))
@example(tree=Condition("integer", Operator.GTE, -(2**63)))
@example(tree=Condition("integer", Operator.GT, -(2**63)))
@example(tree=Condition("integer", Operator.NIN, (2**53 + 1, 2**63 - 1, -(2**63))))
@example(tree=Condition("float", Operator.EQ, -0.0))
@example(tree=Condition("float", Operator.NIN, (0.0, 1e-300, kept_float(1.7976931348623157e308))))
@example(tree=Condition("float", Operator.IN, tuple(kept_float(value) for value in VALUES[FilterType.FLOAT])))
@example(tree=Condition("float", Operator.GT, 1.23456789012345e-30))
@example(tree=Condition("boolean", Operator.IN, (True, False)))
@example(tree=Condition("boolean", Operator.NEQ, True))
def test_stores_return_exactly_the_rows_that_match(loaded: Loaded, tree: Filter) -> None:
    expected = {key for key, row in enumerate(loaded.rows) if matches(tree, row)}
    for name, (store, vector_set) in loaded.stores.items():
        hits = store.search(vector_set, SearchRequest(loaded.query, limit=ROW_COUNT, filter=tree))
        found = [hit.key for hit in hits]
        assert len(found) == len(set(found))
        assert set(found) == expected, name
        for hit in hits[:3]:
            row = loaded.rows[hit.key]  # type: ignore[index]
            assert hit.metadata == {column: value for column, value in row.items() if value is not None}


def test_a_float_equals_itself_whatever_its_digits(loaded: Loaded) -> None:
    """What a store reads back from its disk is what its filters compare, after the next build at the latest."""
    for value in {row["float"] for row in loaded.rows if row.get("float") is not None}:
        expected = {key for key, row in enumerate(loaded.rows) if row.get("float") == value}
        for name, (store, vector_set) in loaded.stores.items():
            equal = Condition("float", Operator.EQ, value)
            hits = store.search(vector_set, SearchRequest(loaded.query, limit=ROW_COUNT, filter=equal))
            assert {hit.key for hit in hits} == expected, (name, value)
            assert {hit.metadata["float"] for hit in hits} == {value}, name
