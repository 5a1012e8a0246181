"""Buffered changes are kept until they are applied, because the source does not send them again."""

from __future__ import annotations

from typing import Any

import pytest

from embedd_dagster.engine.cdc.buffer import ChangeBuffer
from embedd_dagster.engine.cdc.tables import CdcTables
from embedd_dagster.errors import CatalogUnavailable


def test_keys_that_are_put_back_are_buffered_again() -> None:
    buffer = ChangeBuffer(max_keys_per_table=3)
    buffer.add("vt_a", [1, 2])
    keys = buffer.take("vt_a")
    buffer.add("vt_a", [2, 3])
    buffer.put_back("vt_a", keys)
    assert sorted(buffer.take("vt_a") or ()) == [1, 2, 3]  # type: ignore[type-var]
    assert buffer.tables() == []


def test_an_overflow_that_is_put_back_stays_an_overflow() -> None:
    buffer = ChangeBuffer(max_keys_per_table=1)
    assert not buffer.add("vt_a", [1, 2])
    keys = buffer.take("vt_a")
    assert keys is None
    buffer.add("vt_a", [3])
    buffer.put_back("vt_a", keys)
    assert buffer.tables() == ["vt_a"]
    assert buffer.take("vt_a") is None


def test_buffered_keys_of_a_table_that_left_are_kept_until_its_resync_is_recorded() -> None:
    class _Lease:
        def fenced(self) -> Any:
            raise CatalogUnavailable("down")

    lease: Any = _Lease()
    nothing: Any = None
    buffer = ChangeBuffer()
    tables = CdcTables(nothing, nothing, lease, nothing, buffer)
    buffer.add("vt_a", [1])
    with pytest.raises(CatalogUnavailable):
        tables.replace([])
    assert buffer.tables() == ["vt_a"]
    tables.close()
