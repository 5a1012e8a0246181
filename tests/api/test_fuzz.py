"""Hypothesis over filters and cursors, through the API: right answers to what is valid, a 422 to the rest, never a 500."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL

from api.app import create_app
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.core.filters import matches, parse_filter
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ValidationFailed
from tests.api.tenants import Tenant, code_of
from tests.api.test_query import Built
from tests.support.openai_server import running_openai_server

TYPES = {"category": FilterType.KEYWORD, "price": FilterType.FLOAT, "in_stock": FilterType.BOOLEAN}
# as tests/api/conftest.py makes them
ROWS = {n: {"category": f"c{n % 3}", "price": n / 10, "in_stock": n % 2 == 0} for n in range(1, 31)}

quick = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 40), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["c0", "c1", "c2", "", "' OR 1=1 --", "%s", "{}", "\\", "☠", "a" * 300]), st.text(max_size=8),
)  # fmt: skip
_OPERATORS = st.sampled_from(
    ["eq", "neq", "gt", "gte", "lt", "lte", "in", "nin", "exists", "$eq", "$ne", "$in", "like"]
)
_FIELDS = st.sampled_from(["category", "price", "in_stock", "category", "price", "title", "$or", "$and", "x'; --", ""])
_CONDITIONS = st.one_of(
    _VALUES, st.dictionaries(_OPERATORS, st.one_of(_VALUES, st.lists(_VALUES, max_size=4)), max_size=3)
)
_ANYTHING = st.recursive(
    _VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=3)
)
_OBJECTS = st.recursive(
    st.dictionaries(_FIELDS, _CONDITIONS, max_size=3),
    lambda inner: st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)}),
    max_leaves=6,
)
_LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "category": st.one_of(
            st.sampled_from(["c0", "c9", None]),
            st.fixed_dictionaries({"in": st.lists(st.sampled_from(["c0", "c1", "x"]), max_size=3)}),
            st.fixed_dictionaries({"neq": st.sampled_from(["c0", "c1"])}),
        ),
        "price": st.dictionaries(
            st.sampled_from(["gt", "gte", "lt", "lte", "eq", "neq"]), st.floats(-1, 4, allow_nan=False), max_size=2
        ),
        "in_stock": st.one_of(st.booleans(), st.fixed_dictionaries({"exists": st.booleans()})),
    },
)


@pytest.fixture(scope="module", params=["managed", "platform"])
def built(
    request: pytest.FixtureRequest, settings: Any, catalog: Catalog, source: URL, qdrant_url: str
) -> Iterator[Built]:
    with (
        running_openai_server() as server,
        TestClient(create_app(settings.model_copy(update={"qdrant_url": qdrant_url}))) as client,
    ):
        yield Built(Tenant.create(client, catalog, source), server, request.param)


@quick
@given(filters=st.one_of(_LIKELY, _OBJECTS, _ANYTHING))
def test_filters(built: Built, filters: Any) -> None:
    response = built.query(query="x", limit=100, filters=filters)
    if response.status_code == 422:
        assert code_of(response) == "validation_error"
        return
    assert response.status_code == 200, response.text
    as_read = json.loads(json.dumps(filters))
    found = {row["id"] for row in response.json()["results"]}
    try:
        tree = parse_filter(as_read, TYPES) if as_read else None
    except ValidationFailed:
        # 5.0 is 5 to JSON, which the core is more particular about
        return
    assert found == {n for n, row in ROWS.items() if tree is None or matches(tree, row)}


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (
            {"$or": [{"$or": [{"$or": [{"$or": [{"$or": [{"$or": [{"$or": [{"$or": [{"price": 1}]}]}]}]}]}]}]}]},
            "nested",
        ),
        ({"$or": [{"price": n} for n in range(300)]}, "at most 200 conditions"),
        ({"price": {"in": list(range(1001))}}, "at most 1000 values"),
        ({"category": "x" * 10_001}, "at most 10000 characters"),
        ({"category": "a\x00b"}, "NUL"),
        ({"price": 1e300}, None),
        ({"price": 10**400}, "filters.price"),
    ],
)
def test_limits_of_filters(built: Built, filters: Any, says: str | None) -> None:
    response = built.query(query="x", filters=filters)
    if says is None:
        assert response.status_code == 200
        return
    assert (response.status_code, code_of(response)) == (422, "validation_error")
    assert says in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def listed(built: Built) -> tuple[Tenant, str]:
    """A tenant with three environments, and a cursor behind the first."""
    tenant = built.tenant
    for name in ("aa", "bb"):
        tenant.post("/v1/environments", {"name": name})
    return tenant, tenant.get("/v1/environments?limit=1").json()["pagination"]["next_cursor"]


@quick
@given(data=st.data())
def test_cursors(listed: tuple[Tenant, str], data: st.DataObject) -> None:
    tenant, real = listed
    forged = st.builds(
        lambda number, name: base64.urlsafe_b64encode(f"{number}:{name}".encode()).rstrip(b"=").decode(),
        st.one_of(st.integers(), st.text(max_size=5)),
        st.text(max_size=20),
    )
    changed = st.builds(
        lambda place, letter: real[:place] + letter + real[place + 1 :],
        st.integers(0, len(real) - 1),
        st.characters(codec="ascii"),
    )
    cursor = data.draw(st.one_of(st.just(real), changed, forged, st.text(max_size=50), st.just("x" * 3000)))
    response = tenant.send("GET", "/v1/environments", params={"cursor": cursor})
    assert response.status_code in (200, 422), response.text
    if response.status_code == 422:
        assert code_of(response) == "validation_error"
    else:
        # for every position that it names, nothing but this tenant's own is listed
        assert {one["org_id"] for one in response.json()["data"]} <= {tenant.org_id}
