"""Lists: complete, newest first, and stable while rows are added."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from api.pagination import read_cursor, write_cursor
from embedd_dagster.catalog.pages import Position
from tests.api.tenants import Tenant


def test_pages_are_complete_and_stable_while_rows_are_added(tenant: Tenant) -> None:
    made = [tenant.provider()["id"] for _ in range(7)]
    seen: list[str] = []
    cursor = ""
    for number in range(4):
        body = tenant.get(f"/v1/embedding-providers?limit=2{cursor}").json()
        seen += [row["id"] for row in body["data"]]
        assert body["pagination"]["limit"] == 2
        assert body["pagination"]["has_more"] is (number < 3)
        if number < 3:
            cursor = f"&cursor={body['pagination']['next_cursor']}"
            tenant.provider()
    assert seen == made[::-1]
    assert body["pagination"]["next_cursor"] is None


def test_the_default_is_20(tenant: Tenant) -> None:
    for _ in range(21):
        tenant.provider()
    body = tenant.get("/v1/embedding-providers").json()
    assert (len(body["data"]), body["pagination"]["limit"], body["pagination"]["has_more"]) == (20, 20, True)


@given(
    st.integers(0, 4_000_000_000_000_000),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=50),
)
def test_a_cursor_says_its_position(microseconds: int, object_id: str) -> None:
    position = Position(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds), object_id)
    assert read_cursor(write_cursor(position)) == position
