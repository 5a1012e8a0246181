"""What is noted is kept until it is worked off: nobody tells it again."""

from __future__ import annotations

from typing import Any

import pytest

from embedd_dagster.engine.cdc.buffer import NotedKeys
from embedd_dagster.engine.cdc.tables import CdcTables
from embedd_dagster.errors import CatalogUnavailable


def test_what_is_put_back_is_noted_as_before() -> None:
    noted = NotedKeys(max_keys_a_table=3)
    noted.add("vt_a", [1, 2])
    keys = noted.take("vt_a")
    noted.add("vt_a", [2, 3])
    noted.put_back("vt_a", keys)
    assert sorted(noted.take("vt_a") or ()) == [1, 2, 3]  # type: ignore[type-var]
    assert noted.tables() == []


def test_a_table_that_was_given_up_is_so_again() -> None:
    noted = NotedKeys(max_keys_a_table=1)
    assert not noted.add("vt_a", [1, 2])
    keys = noted.take("vt_a")
    assert keys is None
    noted.add("vt_a", [3])
    noted.put_back("vt_a", keys)
    assert noted.tables() == ["vt_a"]
    assert noted.take("vt_a") is None


def test_a_table_that_has_left_keeps_what_is_noted_until_it_is_owed() -> None:
    class _Lease:
        def fenced(self) -> Any:
            raise CatalogUnavailable("down")

    lease: Any = _Lease()
    nothing: Any = None
    tables = CdcTables(nothing, lease, nothing)
    tables._noted.add("vt_a", [1])
    with pytest.raises(CatalogUnavailable):
        tables.take_up([])
    assert tables._noted.tables() == ["vt_a"]
    tables.close()
