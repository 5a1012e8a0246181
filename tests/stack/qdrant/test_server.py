"""The embedded Qdrant through the real client: its answers, its arithmetic, its crashes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

import grpc
import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

SIZE = 16
POINTS = 300


class Server:
    """The server as its users start it: a process on a port of its own."""

    def __init__(self, data: Path, **environment: str) -> None:
        self._data, self._environment = data, {**os.environ, **environment}
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self._port, self.grpc_port = probe.getsockname()[1], other.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server"]
        command += ["--data", str(self._data), "--port", str(self._port)]
        command += ["--grpc-port", str(self.grpc_port)]
        self.process = subprocess.Popen(command, env=self._environment)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server is not ready")

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)

    def client(self, *, prefer_grpc: bool = False, api_key: str | None = None) -> QdrantClient:
        options = {"grpc_port": self.grpc_port, "api_key": api_key, "check_compatibility": not prefer_grpc}
        return QdrantClient(url=self.url, prefer_grpc=prefer_grpc, timeout=30, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("qdrant"))
    yield running
    running.end(signal.SIGTERM)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    if running.process.poll() is None:
        running.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server: Server) -> QdrantClient:
    return server.client()


def create(client: QdrantClient, name: str, *, size: int = SIZE, indexing_threshold: int = 0) -> None:
    client.create_collection(
        name,
        vectors_config=models.VectorParams(size=size, distance=models.Distance.COSINE),
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=indexing_threshold),
    )


@pytest.fixture
def collection(client: QdrantClient) -> Iterator[str]:
    name = f"c_{uuid4().hex[:8]}"
    create(client, name)
    yield name
    client.delete_collection(name)


def random_vectors(count: int, size: int = SIZE, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def fill(client: QdrantClient, name: str, vectors: np.ndarray, first: int = 0) -> None:
    ids = list(range(first, first + len(vectors)))
    payloads = [{"n": n, "even": n % 2 == 0} for n in ids]
    client.upsert(name, models.Batch(ids=ids, vectors=vectors.tolist(), payloads=payloads), wait=True)


def refusal(call: Callable[[], Any]) -> tuple[int | None, str]:
    with pytest.raises(UnexpectedResponse) as refused:
        call()
    return refused.value.status_code, refused.value.structured()["status"]["error"]


def grpc_refusal(server: Server, call: Callable[[QdrantClient], Any], key: str | None = None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        call(server.client(prefer_grpc=True, api_key=key))
    return refused.value.code()


# -- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_client_finds_a_compatible_server(server: Server) -> None:
    assert server.client().info().version.startswith("1.")


def test_refusals_are_those_of_the_real_server(client: QdrantClient, collection: str) -> None:
    point = models.PointStruct(id=1, vector=[1.0] * (SIZE + 1))
    missing = (404, "Not found: Collection `nowhere` doesn't exist!")
    wrong_size = (400, f"Wrong input: Vector dimension error: expected dim: {SIZE}, got {SIZE + 1}")
    assert refusal(lambda: client.get_collection("nowhere")) == missing
    assert refusal(lambda: client.upsert("nowhere", [point])) == missing
    assert refusal(lambda: client.count("nowhere")) == missing
    assert refusal(lambda: create(client, collection)) == (
        409,
        f"Wrong input: Collection `{collection}` already exists!",
    )
    good = models.PointStruct(id=2, vector=[1.0] * SIZE)
    assert refusal(lambda: client.upsert(collection, [good, point])) == wrong_size
    assert refusal(lambda: client.query_points(collection, query=[1.0] * (SIZE + 1))) == wrong_size
    assert refusal(lambda: client.query_points(collection, query=[1.0] * SIZE, limit=0))[0] == 422
    assert refusal(lambda: client.retrieve(collection, ["no-uuid"]))[0] == 400
    assert client.count(collection).count == 0, "a refused batch leaves nothing"
    assert client.delete_collection("nowhere") is False


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("points/query", b"{"),
        ("points/query", b"[]"),
        ("points/query", b'{"limit": "many"}'),
        ("points/query", b'{"filter": {"must": [{"key": "a", "matsch": {"value": 1}}]}}'),
        ("points/query", b'{"filter": {"must": [{"key": "a", "match": {"value": 1.5}}]}}'),
        ("points/query", b'{"filter": {"must": [{"key": "a b", "match": {"value": 1}}]}}'),
        ("points/query", b'{"filter": {"must": [{"key": "a", "match": {"value": 99999999999999999999}}]}}'),
        ("points/scroll", b'{"offset": -1}'),
        ("points/delete", b"{}"),
        ("points/delete", b'{"points": [true]}'),
        ("points/payload", b'{"points": [1]}'),
        ("points/batch", b'{"operations": [{"explode": {}}]}'),
    ],
)
def test_what_is_not_of_the_form_is_a_400(server: Server, collection: str, path: str, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/collections/{collection}/{path}", content=body)
    assert answer.status_code == 400, answer.text
    assert "error" in answer.json()["status"]


@pytest.mark.parametrize(
    "point",
    [{"id": 1}, {"id": 1, "vector": ["a"] * SIZE}, {"id": 1, "vector": [1.0] * SIZE, "payload": 3}, 7, {"id": None}],
)
def test_a_bad_point_is_a_400(server: Server, collection: str, point: object) -> None:
    answer = httpx.put(f"{server.url}/collections/{collection}/points", json={"points": [point]})
    assert answer.status_code == 400, answer.text


def test_a_huge_body_is_refused_and_a_large_one_is_not(server: Server, collection: str) -> None:
    url = f"{server.url}/collections/{collection}/points"
    assert httpx.put(url, content=b" " * (33 * 1024 * 1024)).status_code == 413
    point = {"id": 1, "vector": [1.0] * SIZE, "payload": {"text": "x" * (20 * 1024 * 1024)}}
    assert httpx.put(url, json={"points": [point]}, timeout=30).status_code == 200


def test_a_key_is_required_where_one_is_set(tmp_path: Path) -> None:
    server = Server(tmp_path, EMBEDD_QDRANT_API_KEY="s3cret")
    try:
        assert httpx.get(f"{server.url}/collections").status_code == 401
        assert httpx.get(f"{server.url}/collections", headers={"api-key": "wrong"}).status_code == 401
        assert httpx.get(f"{server.url}/collections", headers={"api-key": "s3cret"}).status_code == 200
        for key, code in (
            (None, grpc.StatusCode.UNAUTHENTICATED),
            ("wrong", grpc.StatusCode.UNAUTHENTICATED),
            ("s3cret", grpc.StatusCode.NOT_FOUND),
        ):
            assert grpc_refusal(server, lambda client: client.retrieve("absent", [1]), key) == code
    finally:
        assert server.end(signal.SIGTERM) == 0


# -- points -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written_over_grpc", [False, True])
@pytest.mark.parametrize("read_over_grpc", [False, True])
def test_a_point_comes_back_as_it_was_given(
    server: Server, collection: str, written_over_grpc: bool, read_over_grpc: bool
) -> None:
    writer, reader = (server.client(prefer_grpc=over_grpc) for over_grpc in (written_over_grpc, read_over_grpc))
    payload = {
        "true": True,
        "one": 1,
        "float": 1.0,
        "null": None,
        "big": 2**63 - 1,
        "list": [True, 1, "x", None],
        "metadata": {"my col": "ä😀\u0000", "deep": {"flag": False}},
    }
    point_id = str(uuid4())
    writer.upsert(collection, [models.PointStruct(id=point_id, vector=[3.0] + [0.0] * (SIZE - 1), payload=payload)])
    (found,) = reader.retrieve(collection, [point_id], with_vectors=True)
    assert found.id == point_id
    assert found.payload == payload
    assert [type(value) for value in (found.payload or {})["list"]] == [bool, int, str, type(None)]
    assert found.vector == [1.0] + [0.0] * (SIZE - 1), "as Qdrant does, cosine vectors are kept normalized"


def test_bad_points_are_refused_over_grpc_and_none_of_the_batch_is_written(
    server: Server, client: QdrantClient, collection: str
) -> None:
    good = models.PointStruct(id=1, vector=[1.0] * SIZE, payload={})
    for bad in (
        models.PointStruct(id=2, vector=[1.0] * (SIZE + 1), payload={}),
        models.PointStruct(id=2, vector={"named": [1.0] * SIZE}, payload={}),
        models.PointStruct(id="no uuid", vector=[1.0] * SIZE, payload={}),
    ):
        code = grpc_refusal(server, lambda over, bad=bad: over.upsert(collection, [good, bad]))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert client.count(collection).count == 0


def test_payloads_are_changed_and_chosen(client: QdrantClient, collection: str) -> None:
    fill(client, collection, random_vectors(4))
    client.set_payload(collection, {"new": {"a": 1, "b": 2}}, points=[0, 1])
    client.overwrite_payload(collection, {"only": True}, points=[1])
    client.delete_payload(collection, ["even"], points=models.Filter(must_not=[models.HasIdCondition(has_id=[3])]))
    payloads = {point.id: point.payload for point in client.scroll(collection)[0]}
    assert payloads == {
        0: {"n": 0, "new": {"a": 1, "b": 2}},
        1: {"only": True},
        2: {"n": 2},
        3: {"n": 3, "even": False},
    }
    assert client.retrieve(collection, [0], with_payload=["new.a"])[0].payload == {"new": {"a": 1}}
    without = models.PayloadSelectorExclude(exclude=["n"])
    assert client.retrieve(collection, [3], with_payload=without)[0].payload == {"even": False}
    assert client.retrieve(collection, [3], with_payload=False)[0].payload is None


def test_operations_in_a_batch_are_applied_in_order(client: QdrantClient, collection: str) -> None:
    point = models.PointStruct(id=1, vector=[1.0] * SIZE, payload={"a": 1})
    client.batch_update_points(
        collection,
        [
            models.UpsertOperation(upsert=models.PointsList(points=[point])),
            models.SetPayloadOperation(set_payload=models.SetPayload(payload={"b": 2}, points=[1])),
            models.DeleteOperation(delete=models.PointIdsList(points=[99])),
        ],
    )
    assert client.retrieve(collection, [1])[0].payload == {"a": 1, "b": 2}


def test_scrolling_in_pages_meets_every_point_once(client: QdrantClient, collection: str) -> None:
    fill(client, collection, random_vectors(POINTS))
    seen: list[Any] = []
    offset = None
    while True:
        page, offset = client.scroll(collection, limit=70, offset=offset, with_payload=False)
        seen += [point.id for point in page]
        if offset is None:
            break
    assert seen == list(range(POINTS))


def brute_force(vectors: np.ndarray, query: np.ndarray, keep: np.ndarray) -> list[int]:
    scores = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    return [int(n) for n in np.argsort(-np.where(keep, scores, -9)) if keep[n]]


def test_search_equals_brute_force(client: QdrantClient, collection: str) -> None:
    vectors = random_vectors(POINTS)
    fill(client, collection, vectors)
    even = models.Filter(must=[models.FieldCondition(key="even", match=models.MatchValue(value=True))])
    for query in random_vectors(5, seed=11):
        expected = brute_force(vectors, query, np.arange(POINTS) % 2 == 0)
        found = client.query_points(collection, query=query.tolist(), query_filter=even, limit=10, offset=3).points
        assert [point.id for point in found] == expected[3:13]
        nearest = vectors[expected[3]]
        cosine = float(nearest @ query / np.linalg.norm(nearest) / np.linalg.norm(query))
        assert found[0].score == pytest.approx(cosine, abs=1e-5)
        close = client.query_points(collection, query=query.tolist(), score_threshold=found[0].score, limit=POINTS)
        assert min(point.score for point in close.points) > found[0].score, "as Qdrant's, the threshold is exclusive"


# -- filters ------------------------------------------------------------------------------------------------------------

SCALARS: list[Any] = [True, False, 0, 1, 2, -5, 1.0, 2.5, 2**53 + 1, "", "a", "b", "1", "true"]
KEYS = {"a": ("a",), "m.b": ("m", "b"), 'm."my col"': ("m", "my col"), 'm."x.y"': ("m", "x.y")}
FIELD = st.sampled_from(sorted(KEYS))
# What an index serves is what its kind can hold (an integer index takes 1.0 for 1): so there, a column has one kind.
BY_KIND = [["", "a", "b", "1", "true"], [True, False], [0, 1, 2, -5, 2**53 + 1], [1.0, 2.5, -5.25, 0, 2]]
BOUND = st.sampled_from([-5, 0, 1, 1.5, 2, 2.5])


def random_payload(chooser: random.Random, kinds: list[list[Any]]) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for (first, *rest), scalars in zip(KEYS.values(), kinds, strict=True):
        kind = chooser.random()
        if kind < 0.2:
            continue
        value: Any = chooser.choice(scalars)
        if kind > 0.85:
            value = chooser.choice([None, [], [None], chooser.sample(scalars, 2)])
        if rest:
            payload.setdefault(first, {})[rest[0]] = value
        else:
            payload[first] = value
    return payload


def stored(payload: dict[str, Any], key: str) -> Any:
    value: Any = payload
    for step in KEYS[key]:
        if not isinstance(value, dict) or step not in value:
            return ...
        value = value[step]
    return value


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def holds(condition: Any, payload: dict[str, Any]) -> bool:
    """The meaning of a filter, spelled out: of a list of values, any one."""
    if isinstance(condition, models.Filter):
        must, should, must_not = (
            [holds(each, payload) for each in side or []]
            for side in (condition.must, condition.should, condition.must_not)
        )
        least = condition.min_should
        enough = least is None or sum(holds(each, payload) for each in least.conditions) >= least.min_count
        return all(must) and (not should or any(should)) and not any(must_not) and enough
    if isinstance(condition, models.IsEmptyCondition):
        return stored(payload, condition.is_empty.key) in (..., None, [])
    if isinstance(condition, models.IsNullCondition):
        value = stored(payload, condition.is_null.key)
        return value is None or (isinstance(value, list) and None in value)
    value = stored(payload, condition.key)
    values = [] if value is ... else value if isinstance(value, list) else [value]
    if (between := condition.range) is not None:
        return any(
            isinstance(each, int | float)
            and not isinstance(each, bool)
            and (between.gte is None or each >= between.gte)
            and (between.lt is None or each < between.lt)
            for each in values
        )
    match condition.match:
        case models.MatchValue(value=wanted):
            return any(same(each, wanted) for each in values)
        case models.MatchAny(any=wanted):
            return any(same(each, one) for each in values for one in wanted)
        case models.MatchExcept(except_=unwanted):
            return any(each is not None and not any(same(each, one) for one in unwanted) for each in values)
    raise AssertionError(condition)


STRINGS = st.lists(st.sampled_from(["", "a", "b", "1", "true"]), min_size=1, max_size=3)
INTEGERS = st.lists(st.sampled_from([0, 1, 2, -5, 2**53 + 1]), min_size=1, max_size=3)
VALUE = st.sampled_from([value for value in SCALARS if not isinstance(value, float)])
MATCH: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda value: models.MatchValue(value=value), VALUE),
    st.builds(lambda values: models.MatchAny(any=values), STRINGS | INTEGERS),
    st.builds(lambda values: models.MatchExcept(**{"except": values}), STRINGS | INTEGERS),
)
LEAF: st.SearchStrategy[Any] = st.one_of(
    st.builds(lambda key, match: models.FieldCondition(key=key, match=match), FIELD, MATCH),
    st.builds(lambda key, a, b: models.FieldCondition(key=key, range=models.Range(gte=a, lt=b)), FIELD, BOUND, BOUND),
    st.builds(lambda key, a: models.FieldCondition(key=key, range=models.Range(gte=a)), FIELD, BOUND),
    st.builds(lambda key: models.IsEmptyCondition(is_empty=models.PayloadField(key=key)), FIELD),
    st.builds(lambda key: models.IsNullCondition(is_null=models.PayloadField(key=key)), FIELD),
)


def some(conditions: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(conditions, min_size=1, max_size=3)


TREE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda a, b: models.Filter(must=a, must_not=b), some(inner), some(inner)),
        st.builds(lambda a: models.Filter(should=a), some(inner)),
        st.builds(
            lambda a, n: models.Filter(min_should=models.MinShould(conditions=a, min_count=n)),
            some(inner),
            st.integers(1, 3),
        ),
    ),
    max_leaves=6,
)


@dataclass(repr=False)
class Filtered:
    name: str
    payloads: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["unindexed", "indexed", "optimized"])
def filtered(client: QdrantClient, request: pytest.FixtureRequest) -> Filtered:
    name = f"filtered_{request.param}"
    create(client, name)
    chooser = random.Random(5)
    kinds = [SCALARS] * 4 if request.param == "unindexed" else BY_KIND
    payloads = [random_payload(chooser, kinds) for _ in range(200)]
    vectors = random_vectors(len(payloads)).tolist()
    client.upsert(name, models.Batch(ids=list(range(200)), vectors=vectors, payloads=payloads))
    if request.param != "unindexed":
        schemas: list[Any] = [
            "keyword",
            "bool",
            models.IntegerIndexParams(type="integer", lookup=True, range=True),
            "float",
        ]
        for key, schema in zip(KEYS, schemas, strict=True):
            client.create_payload_index(name, key, schema)
    if request.param == "optimized":
        client.update_collection(name, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1))
        wait_until_green(client, name)
    return Filtered(name, payloads)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(condition=TREE)
def test_filters_mean_what_they_say(client: QdrantClient, filtered: Filtered, condition: Any) -> None:
    name, payloads = filtered.name, filtered.payloads
    page, _ = client.scroll(name, models.Filter(must=[condition]), limit=1000, with_payload=False)
    expected = [n for n, payload in enumerate(payloads) if holds(condition, payload)]
    assert [point.id for point in page] == expected


def test_a_nested_filter_holds_within_one_element(client: QdrantClient, collection: str) -> None:
    payloads = [{"l": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]}, {"l": [{"a": 1, "b": 4}]}]
    vectors = random_vectors(2).tolist()
    client.upsert(collection, models.Batch(ids=[0, 1], vectors=vectors, payloads=payloads))
    both = [models.FieldCondition(key=key, match=models.MatchValue(value=v)) for key, v in (("a", 1), ("b", 4))]
    nested = models.NestedCondition(nested=models.Nested(key="l[]", filter=models.Filter(must=both)))
    assert [point.id for point in client.scroll(collection, models.Filter(must=[nested]))[0]] == [1]


# -- collections and aliases --------------------------------------------------------------------------------------------


def create_alias(alias: str, collection: str) -> models.CreateAliasOperation:
    return models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=collection, alias_name=alias))


def delete_alias(alias: str) -> models.DeleteAliasOperation:
    return models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))


def test_aliases_change_together_or_not_at_all(client: QdrantClient) -> None:
    for name in ("old", "new"):
        create(client, name)
    fill(client, "old", random_vectors(1))
    client.update_collection_aliases([create_alias("live", "old")])
    assert client.count("live").count == 1
    client.upsert("live", [models.PointStruct(id=5, vector=[1.0] * SIZE)])
    assert client.count("old").count == 2
    status, _ = refusal(lambda: client.update_collection_aliases([delete_alias("live"), create_alias("x", "nowhere")]))
    assert status == 404
    assert [each.alias_name for each in client.get_collection_aliases("old").aliases] == ["live"]
    client.update_collection_aliases([delete_alias("live"), create_alias("live", "new")])
    assert client.count("live").count == 0
    rename = models.RenameAlias(old_alias_name="live", new_alias_name="lively")
    client.update_collection_aliases([models.RenameAliasOperation(rename_alias=rename)])
    assert client.get_aliases().aliases == [models.AliasDescription(alias_name="lively", collection_name="new")]
    client.delete_collection("new")
    assert client.get_aliases().aliases == []
    client.delete_collection("old")


def test_payload_indexes_are_listed_and_removed(client: QdrantClient, collection: str) -> None:
    both = models.IntegerIndexParams(type="integer", lookup=True, range=True)
    client.create_payload_index(collection, "n", both)
    client.create_payload_index(collection, 'metadata."my col"', models.PayloadSchemaType.KEYWORD)
    schema = client.get_collection(collection).payload_schema
    assert schema["n"].params == both
    assert schema['metadata."my col"'].data_type == models.PayloadSchemaType.KEYWORD
    client.delete_payload_index(collection, 'metadata."my col"')
    assert list(client.get_collection(collection).payload_schema) == ["n"]


def wait_until_green(client: QdrantClient, name: str) -> models.CollectionInfo:
    deadline = time.monotonic() + 60
    while (info := client.get_collection(name)).status != models.CollectionStatus.GREEN:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return info


def switch_on_indexing(client: QdrantClient, name: str) -> None:
    client.update_collection(name, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=100))


def test_the_index_is_built_while_points_are_read_and_written(client: QdrantClient, collection: str) -> None:
    vectors = random_vectors(6_000)
    client.create_payload_index(collection, "n", models.PayloadSchemaType.INTEGER)
    fill(client, collection, vectors)
    assert client.get_collection(collection).indexed_vectors_count == 0
    switch_on_indexing(client, collection)
    assert client.get_collection(collection).status == models.CollectionStatus.YELLOW
    moved = -vectors[:50]
    fill(client, collection, moved)
    client.delete(collection, list(range(50, 60)))
    client.delete(collection, models.Filter(must=[models.FieldCondition(key="n", range=models.Range(gte=5_990))]))
    client.create_payload_index(collection, "even", models.PayloadSchemaType.BOOL)
    info = wait_until_green(client, collection)
    assert info.config.optimizer_config.indexing_threshold == 100
    assert info.points_count == 5_980
    assert (info.indexed_vectors_count or 0) >= 5_900
    assert set(info.payload_schema) == {"n", "even"}
    vectors[:50] = moved
    keep = np.ones(6_000, dtype=bool)
    keep[50:60] = keep[5_990:] = False
    hits = 0
    for query in vectors[:20]:
        found = client.query_points(collection, query=query.tolist(), limit=10).points
        hits += len({point.id for point in found} & set(brute_force(vectors, query, keep)[:10]))
    assert hits >= 190, "an approximate index, but a good one"


def test_readers_never_see_a_500_while_collections_come_and_go(server: Server) -> None:
    seen: set[int] = set()
    stop = threading.Event()

    def read() -> None:
        with httpx.Client(base_url=server.url) as http:
            while not stop.is_set():
                for name in ("face", "set0", "set1"):
                    body = {"query": [1.0] * SIZE}
                    seen.add(http.post(f"/collections/{name}/points/query", json=body).status_code)
                    seen.add(http.get(f"/collections/{name}").status_code)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    writer = server.client()
    for turn in range(8):
        name = f"set{turn % 2}"
        create(writer, name)
        fill(writer, name, random_vectors(200))
        writer.update_collection_aliases([create_alias("face", name)])
        writer.update_collection(name, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1))
        writer.delete_collection(f"set{(turn + 1) % 2}")
    stop.set()
    for reader in readers:
        reader.join()
    writer.delete_collection("set1")
    assert seen <= {200, 404}, seen
    assert 200 in seen


def index_builder_of(server: Server) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(server.process.pid).children():
            if "embedd_dagster.stack.qdrant.optimizer" in child.cmdline():
                return child
        time.sleep(0.01)
    raise AssertionError("no index is being built")


def test_a_failed_index_build_is_red_with_its_reason_until_settings_are_changed(
    server: Server, client: QdrantClient, collection: str
) -> None:
    fill(client, collection, random_vectors(6_000))
    switch_on_indexing(client, collection)
    index_builder_of(server).kill()
    deadline = time.monotonic() + 60
    while (info := client.get_collection(collection)).status != models.CollectionStatus.RED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert isinstance(info.optimizer_status, models.OptimizersStatusOneOf1)
    assert "exit code" in info.optimizer_status.error
    switch_on_indexing(client, collection)
    info = wait_until_green(client, collection)
    assert (info.indexed_vectors_count or 0) >= 5_900


@pytest.mark.parametrize("accepted", ["gzip", "identity"])
def test_answers_are_compressed_for_clients_that_accept_it(server: Server, accepted: str) -> None:
    answer = httpx.get(f"{server.url}/collections", headers={"accept-encoding": accepted})
    assert answer.headers.get("content-encoding", "identity") == accepted


def test_strict_mode_is_kept_over_a_restart_and_changed_in_part(own_server: Server) -> None:
    client = own_server.client()
    create(client, "c")
    client.update_collection("c", strict_mode_config=models.StrictModeConfig(enabled=True, max_query_limit=3))
    client.update_collection("c", strict_mode_config=models.StrictModeConfig(search_allow_exact=False))
    own_server.end(signal.SIGKILL)
    own_server.start()
    kept = client.get_collection("c").config.strict_mode_config
    assert kept is not None
    assert (kept.enabled, kept.max_query_limit, kept.search_allow_exact) == (True, 3, False)
    status, error = refusal(lambda: client.scroll("c", limit=4))
    assert (status, error) == (
        400,
        'Bad request: Limit exceeded 4 > 3 for "limit". Help: Reduce the "limit" parameter to or below 3.',
    )
    refusal(lambda: client.count("c", exact=True))


def test_range_bounds_are_read_as_the_real_server_reads_them(client: QdrantClient, collection: str) -> None:
    points = [models.PointStruct(id=n, vector=[1.0] * SIZE, payload={"n": 9007199254740990 + n}) for n in range(2)]
    client.upsert(collection, points)

    def found(bound: str) -> list[Any]:
        body = '{"filter": {"must": [{"key": "n", "range": {"gte": BOUND, "lte": BOUND}}]}}'.replace("BOUND", bound)
        url = f"{client._client.rest_uri}/collections/{collection}/points/scroll"  # type: ignore[attr-defined]
        return [point["id"] for point in httpx.post(url, content=body).json()["result"]["points"]]

    assert found("9007199254740991") == [1]
    assert found("9007199254740991.0") == [0], "the digits of a double are scaled, which rounds"


# -- crashes ------------------------------------------------------------------------------------------------------------


WRITTEN = models.FieldCondition(key="turn", range=models.Range(gte=0))


def write_until_killed(
    server: Server, name: str, acknowledged: dict[int, int], delay: float, *, over_grpc: bool
) -> None:
    """Rewrites points 0…499 again and again; `acknowledged` holds what the server has said yes to."""
    client = server.client(prefer_grpc=over_grpc)
    killer = threading.Timer(delay, server.process.kill)
    killer.start()
    turn = 0
    while True:
        turn += 1
        ids = [(turn * 20 + n) % 500 for n in range(20)]
        points = [models.PointStruct(id=n, vector=[float(n + 1)] * SIZE, payload={"turn": turn}) for n in ids]
        try:
            client.upsert(name, points, wait=True)
        except Exception:
            break
        acknowledged.update(dict.fromkeys(ids, turn))
    killer.join()
    server.process.wait(10)


@pytest.mark.parametrize("over_grpc", [False, True])
def test_kill_9_loses_no_acknowledged_write(own_server: Server, over_grpc: bool) -> None:
    client = own_server.client()
    create(client, "c")
    client.create_payload_index("c", "turn", models.PayloadSchemaType.INTEGER)
    client.update_collection_aliases([create_alias("face", "c")])
    acknowledged: dict[int, int] = {}
    # The second and third time while an index is being built: before, in or after the switch, as it happens.
    for round_number, delay in enumerate((0.4, 0.8, 1.3)):
        if round_number:
            fill(client, "c", random_vectors(3_000, seed=round_number), first=1_000 * 10**round_number)
            client.update_collection("c", optimizers_config=models.OptimizersConfigDiff(indexing_threshold=20))
        write_until_killed(own_server, "c", acknowledged, delay, over_grpc=over_grpc)
        assert acknowledged
        own_server.start()
        stored_turns = {
            point.id: (point.payload or {})["turn"]
            for point in client.scroll("face", models.Filter(must=[WRITTEN]), limit=1000)[0]
        }
        assert stored_turns.keys() >= acknowledged.keys()
        assert all(stored_turns[n] >= turn for n, turn in acknowledged.items())
        assert client.count("face").count == len(stored_turns) + 3_000 * round_number
        assert set(client.get_collection("c").payload_schema) == {"turn"}


def test_sigterm_ends_it_cleanly_and_all_is_there_again(own_server: Server) -> None:
    client = own_server.client()
    create(client, "c", indexing_threshold=0)
    names = [UUID(int=n) for n in range(3)] + [uuid5(UUID(int=0), "x")]
    points = [models.PointStruct(id=str(name), vector=[1.0] * SIZE, payload={"b": True}) for name in names]
    client.upsert("c", points, wait=False)
    client.update_collection_aliases([create_alias("face", "c")])
    assert own_server.end(signal.SIGTERM) == 0
    own_server.start()
    assert {point.id for point in client.scroll("face")[0]} == {str(name) for name in names}
    assert client.get_collection("c").config.optimizer_config.indexing_threshold == 0


def test_a_second_server_does_not_take_the_directory(own_server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server", "--data", str(tmp_path), "--port", "1"]
    second = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert second.returncode != 0
    assert b"another server" in second.stderr
