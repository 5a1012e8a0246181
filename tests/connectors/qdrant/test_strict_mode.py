"""A collection in strict mode, as hosted Qdrant makes them: calls are made as small as it allows, or what to set is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest

from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.filters import Condition, Operator
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import SearchRequest

COUNT = 700
VECTORS = np.random.default_rng(3).standard_normal((COUNT, 4)).astype(np.float32)
POINTS = PointBatch(
    keys=list(range(COUNT)), texts=[f"text {n}" for n in range(COUNT)],
    metadata=[{"color": f"c{n % 50}", "size": n} for n in range(COUNT)], row_hashes=list(range(COUNT)),
    text_hashes=[0] * COUNT, buckets=[n * 93 for n in range(COUNT)], vectors=VECTORS,
)  # fmt: skip
SetLimits = Callable[..., None]


@pytest.fixture
def vector_set() -> VectorSet:
    vector_table_id = f"vt_{uuid4().hex[:26]}"
    types = {"color": FilterType.KEYWORD, "size": FilterType.INTEGER}
    return VectorSet(vector_table_id, 1, f"{vector_table_id[:11]}_s", 4, types)


@pytest.fixture(params=["rest", "grpc"])
def store(
    request: pytest.FixtureRequest, qdrant_url: str, qdrant_grpc_port: int, vector_set: VectorSet
) -> Iterator[QdrantStore]:
    with QdrantStore(qdrant_url, grpc_port=qdrant_grpc_port if request.param == "grpc" else None) as opened:
        opened.create(vector_set)
        yield opened
        opened.drop(vector_set.vector_table_id, 1)


@pytest.fixture
def set_limits(qdrant_url: str, vector_set: VectorSet) -> SetLimits:
    def set_limits(**limits: Any) -> None:
        body = {"strict_mode_config": {"enabled": True, **limits}}
        httpx.patch(f"{qdrant_url}/collections/{vector_set.versioned_name}", json=body).raise_for_status()

    return set_limits


@pytest.mark.parametrize(
    "limits",
    [
        {"search_allow_exact": False}, {"max_query_limit": 100}, {"search_max_hnsw_ef": 16}, {"condition_max_size": 10},
        {"filter_max_conditions": 10}, {"upsert_max_batchsize": 256}, {"max_payload_index_count": 2},
        {"unindexed_filtering_retrieve": False},
        {
            "search_allow_exact": False, "max_query_limit": 100, "search_max_hnsw_ef": 64, "upsert_max_batchsize": 99,
            "filter_max_conditions": 20, "condition_max_size": 20,
        },
    ],
    ids="+".join,
)  # fmt: skip
def test_a_whole_life_under_a_limit_gives_the_same_answers(
    store: QdrantStore, vector_set: VectorSet, set_limits: SetLimits, limits: dict[str, Any]
) -> None:
    set_limits(**limits)
    store.upsert(vector_set, POINTS)
    store.index_buckets(vector_set)
    store.finish_load(vector_set)
    assert store.count(vector_set) == COUNT
    assert len(store.vectors(vector_set, range(COUNT))) == COUNT
    assert len(list(store.fingerprints(vector_set, 8, None))) == COUNT
    buckets = range(0, 256, 2)
    expected = {n for n in range(COUNT) if (n * 93 >> 8) % 2 == 0}
    assert {print_.key for print_ in store.fingerprints(vector_set, 8, buckets)} == expected

    colors = tuple(f"c{n}" for n in range(0, 50, 2))
    few = Condition("color", Operator.IN, ("c7",))
    for condition, matching in (
        (few, range(7, COUNT, 50)),
        (Condition("color", Operator.IN, colors), range(0, COUNT, 2)),
    ):
        hits = store.search(vector_set, SearchRequest(VECTORS[0], limit=100, filter=condition))
        scores = {n: float(VECTORS[n] @ VECTORS[0] / np.linalg.norm(VECTORS[n])) for n in matching}
        best = sorted(scores, key=lambda n: -scores[n])[:100]
        assert [hit.key for hit in hits] == best
    top = Condition("size", Operator.GTE, 2**56)
    assert store.search(vector_set, SearchRequest(VECTORS[0], limit=10, filter=top)) == []

    store.delete(vector_set, range(0, COUNT, 2))
    assert store.count(vector_set) == COUNT // 2


def test_a_write_larger_than_the_minute_allows_is_split_and_finished(
    store: QdrantStore, vector_set: VectorSet, set_limits: SetLimits
) -> None:
    set_limits(write_rate_limit=COUNT - 30)
    store.upsert(vector_set, POINTS)
    assert store.count(vector_set) == COUNT


def test_a_rate_limit_is_told_with_its_wait(store: QdrantStore, vector_set: VectorSet, set_limits: SetLimits) -> None:
    set_limits(write_rate_limit=COUNT)
    store.upsert(vector_set, POINTS)
    with pytest.raises(VectorStoreUnavailable) as caught:
        store.upsert(vector_set, POINTS)
    assert caught.value.retry_after_seconds


def test_a_read_larger_than_the_minute_allows_is_split(
    store: QdrantStore, vector_set: VectorSet, set_limits: SetLimits
) -> None:
    store.upsert(vector_set, POINTS)
    set_limits(read_rate_limit=60)
    buckets = range(0, 256, 4)  # 64 ranges, each a condition that costs a unit
    with pytest.raises(VectorStoreUnavailable) as caught:
        list(store.fingerprints(vector_set, 8, buckets))
    assert caught.value.retry_after_seconds, "the first part was allowed, the second has to wait"


def test_a_limit_that_cannot_be_kept_is_told_with_its_name(
    store: QdrantStore, vector_set: VectorSet, set_limits: SetLimits
) -> None:
    store.upsert(vector_set, POINTS)
    set_limits(max_query_limit=5)
    with pytest.raises(VectorStoreRejected, match='"limit"') as caught:
        store.search(vector_set, SearchRequest(VECTORS[0], limit=50))
    assert "strict_mode_config" in caught.value.resolution
    set_limits(max_payload_index_count=0, unindexed_filtering_retrieve=False)
    with pytest.raises(VectorStoreRejected, match="max_payload_index_count"):
        store.index_buckets(vector_set)
