"""Planning a sync, cutting a table into ranges, packing rows into batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.core.changes import plan_changes
from embedd_dagster.core.rows import Fingerprint, TableDigest, digest_bits
from embedd_dagster.core.shards import BatchLimits, KeyRange, in_chunks, pack_batches, ranges_between

rows = st.dictionaries(st.integers(0, 20), st.integers(0, 3))


@given(rows, rows)
def test_a_plan_makes_the_store_equal_to_the_source(source: dict[int, int], stored: dict[int, int]) -> None:
    plan = plan_changes(
        [Fingerprint(key, value, key % 7) for key, value in source.items()],
        [Fingerprint(key, value, key % 7) for key, value in stored.items()],
    )
    result = dict(stored)
    for key in plan.deleted:
        del result[key]  # type: ignore[arg-type]
    for row in plan.changed:
        assert stored.get(row.key) != row.row_hash, "nothing unchanged is read again"  # type: ignore[call-overload]
        result[row.key] = row.row_hash  # type: ignore[index]
    assert result == source
    assert plan.unchanged_count + len(plan.changed) == len(source)


def test_digests_name_the_buckets_that_changed() -> None:
    before = TableDigest(2, np.array([1, 2, 3, 0]), 6)
    assert TableDigest(2, np.array([1, 9, 3, 5]), 8).changed_buckets(before) == [1, 3]
    assert TableDigest(2, np.array([1, 2, 3, 0]), 6).changed_buckets(before) == []
    assert TableDigest(1, np.array([1, 2]), 6).changed_buckets(before) is None
    assert TableDigest(2, np.array([1, 2, 3, 0]), 6).changed_buckets(None) is None


@pytest.mark.parametrize(("rows_", "bits"), [(0, 0), (511, 0), (512, 1), (1_000_000, 11), (10**9, 16)])
def test_the_bucket_count_grows_with_the_table(rows_: int, bits: int) -> None:
    assert digest_bits(rows_) == bits


def test_ranges_cover_everything_once() -> None:
    assert ranges_between([]) == [KeyRange()]
    assert ranges_between([10, 20]) == [KeyRange(None, 10), KeyRange(10, 20), KeyRange(20, None)]


@given(
    st.lists(st.tuples(st.integers(), st.integers(0, 50), st.integers(0, 50))),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 60),
)
def test_batches_keep_order_and_limits(
    items: list[tuple[int, int, int]], max_items: int, max_tokens: int, max_bytes: int
) -> None:
    tagged = [((index, item[1], item[2]), item[1], item[2]) for index, item in enumerate(items)]
    batches = list(pack_batches(tagged, BatchLimits(max_items, max_tokens, max_bytes)))
    assert [entry for batch in batches for entry in batch] == [entry for entry, _tokens, _size in tagged]
    for batch in batches:
        assert 0 < len(batch) <= max_items
        if len(batch) > 1:
            assert sum(tokens for _index, tokens, _size in batch) <= max_tokens
            assert sum(size for _index, _tokens, size in batch) <= max_bytes


def test_chunks() -> None:
    assert [list(chunk) for chunk in in_chunks([1, 2, 3], 2)] == [[1, 2], [3]]
    assert list(in_chunks([], 2)) == []
