"""What every vector store does, over every store there is."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID, uuid4

import numpy as np
import pytest
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.connectors.registry import open_platform_store, registered
from embedd_dagster.core.embedded_text import text_hash, text_hashes
from embedd_dagster.core.filters import parse_filter
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ConfigurationError, VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.protocols.store import SearchRequest, Store
from tests.support.toy_connector.database import create_database
from tests.support.toy_connector.spec import SPEC
from tests.support.toy_connector.store import ToyStore

DIMENSIONS = 8
FILTER_TYPES = {"color": FilterType.KEYWORD, "price": FilterType.FLOAT}
HOSTILE_NAMES = [
    "my.col", 'quo"te', "sing'le", "[]", "a[0]", "back\\slash", "100%", "%s", "%22", "%25", "{x}", "with space", "Ünïcode",
    "$eq", "semi;colon--", "metadata", "a.b.c[]", "?", "new\nline",
]  # fmt: skip


@pytest.fixture(params=["qdrant", "qdrant over grpc", "pgvector", "toy", "toy platform"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param.startswith("toy"):
        with registered(SPEC), _open_toy(request.param) as toy:
            yield toy
        return
    if request.param != "pgvector":
        port = request.getfixturevalue("qdrant_grpc_port") if "grpc" in request.param else None
        opened: Store = QdrantStore(request.getfixturevalue("qdrant_url"), grpc_port=port)
    else:
        opened = open_platform_store("postgresql", credentials_of(request.getfixturevalue("database_url")))
    with opened:
        yield opened


def _open_toy(kind: str) -> Store:
    if kind == "toy":
        return SPEC.managed_store.open(None, None)  # type: ignore[union-attr, arg-type]
    create_database("contract", "token")
    return open_platform_store("toy", {"database": "contract", "token": "token"})


def credentials_of(database_url: str) -> dict[str, object]:
    parts = conninfo_to_dict(database_url)
    return {
        "host": parts["host"],
        "port": int(parts["port"] or 5432),
        "database": parts["dbname"],
        "user": parts["user"],
        "password": parts["password"],
    }


def new_set(
    *,
    version: int = 1,
    key_type: str = "bigint",
    dimensions: int = DIMENSIONS,
    filter_types: dict[str, FilterType] | None = None,
    like: VectorSet | None = None,
) -> VectorSet:
    vector_table_id = like.vector_table_id if like else f"vt_{uuid4().hex[:26]}"
    types = filter_types if filter_types is not None else FILTER_TYPES
    return VectorSet(vector_table_id, version, f"{vector_table_id[:11]}_things", dimensions, types, key_type)


def batch(keys: list[Key], *, dimensions: int = DIMENSIONS, seed: int = 0, **columns: list[object]) -> PointBatch:
    vectors = np.random.default_rng(seed).standard_normal((len(keys), dimensions)).astype(np.float32)
    texts = [f"text {key}" for key in keys]
    given: dict[str, object] = {
        "keys": keys,
        "texts": texts,
        "metadata": [{"color": "red" if index % 2 else "blue", "price": index / 2} for index in range(len(keys))],
        "row_hashes": [index * 7 - 3 for index in range(len(keys))],
        "text_hashes": text_hashes(texts),
        "buckets": [(index * 9973) % 65536 for index in range(len(keys))],
        "vectors": vectors,
    }
    return PointBatch(**{**given, **columns})  # type: ignore[arg-type]


def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    return (vectors @ query) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))


def loaded(store: Store, points: PointBatch, **options: object) -> VectorSet:
    vector_set = new_set(**options)  # type: ignore[arg-type]
    store.create(vector_set)
    store.upsert(vector_set, points)
    return vector_set


def test_check_passes(store: Store) -> None:
    store.check()


def test_create_keeps_what_is_there(store: Store) -> None:
    vector_set = loaded(store, batch([1, 2, 3]))
    store.create(vector_set)
    assert store.count(vector_set) == 3


def test_what_does_not_exist_is_empty_and_may_be_dropped(store: Store) -> None:
    vector_set = new_set()
    assert store.count(vector_set) == 0
    assert store.versions(vector_set.vector_table_id) == []
    store.drop(vector_set.vector_table_id, 1)
    store.drop_public_name(vector_set.vector_table_id, vector_set.public_name)


def test_searching_a_dropped_set_is_transient_and_writing_to_it_is_not(store: Store) -> None:
    vector_set = loaded(store, batch([1]))
    store.drop(vector_set.vector_table_id, 1)
    with pytest.raises(VectorStoreUnavailable):
        store.search(vector_set, SearchRequest(np.ones(DIMENSIONS, np.float32), limit=1))
    with pytest.raises(VectorStoreRejected):
        store.upsert(vector_set, batch([1]))


def test_upsert_replaces_the_whole_point(store: Store) -> None:
    vector_set = loaded(store, batch([1, 2, 3]))
    changed = batch([2, 4], seed=5, texts=["new two", "four"], metadata=[{"color": "green"}, {}])
    store.upsert(vector_set, changed)
    store.upsert(vector_set, changed)
    assert store.count(vector_set) == 4
    hit = store.search(vector_set, SearchRequest(changed.vectors[0], limit=1))[0]
    assert (hit.key, hit.embedded_text, hit.metadata) == (2, "new two", {"color": "green"})
    assert hit.similarity_score == pytest.approx(1, abs=1e-5)
    assert {point.key: point.row_hash for point in store.fingerprints(vector_set, 0, None)} == {
        1: -3, 2: -3, 3: 11, 4: 4,
    }  # fmt: skip


def test_of_a_key_that_is_twice_in_a_batch_the_last_one_stays(store: Store) -> None:
    vector_set = loaded(store, batch([1, 2, 1], texts=["old", "two", "new"]))
    assert store.count(vector_set) == 2
    assert {hit.embedded_text for hit in store.search(vector_set, SearchRequest(np.ones(DIMENSIONS, np.float32), limit=5))} == {
        "two", "new",
    }  # fmt: skip


def test_an_empty_batch_is_nothing(store: Store) -> None:
    vector_set = loaded(store, batch([]))
    store.delete(vector_set, [])
    assert store.vectors(vector_set, []) == {}
    assert store.count(vector_set) == 0


def test_delete_removes_the_points_of_these_keys(store: Store) -> None:
    vector_set = loaded(store, batch(list(range(10))))
    store.delete(vector_set, [1, 3, 99])
    store.delete(vector_set, [1])
    assert sorted(point.key for point in store.fingerprints(vector_set, 0, None)) == [0, 2, 4, 5, 6, 7, 8, 9]


KEYS: dict[str, list[Key]] = {
    "bigint": [0, -(2**63), 2**63 - 1, 42],
    "integer": [0, -5, 2**31 - 1],
    "smallint": [0, -32768, 32767],
    "text": ["", "a", "A", "a ", "ünï", "x" * 2000, "quo'te", 'dou"ble', "back\\slash", "i:1"],
    "character varying(40)": ["a", "B%s"],
    "uuid": [uuid4(), UUID(int=0), UUID(int=2**128 - 1)],
    "numeric(30,10)": [Decimal("1.5"), Decimal("-12345678901234567890.0123456789"), Decimal(0), Decimal(10)],
    "numeric": [Decimal("1e-20"), Decimal(10) ** 40],
    "date": [date(2024, 2, 29), date(1, 1, 1), date(9999, 12, 31)],
    "timestamp without time zone": [
        datetime.fromisoformat("2024-02-29T01:02:03.456789"),
        datetime.fromisoformat("1900-01-01"),
    ],
    "timestamp(3) with time zone": [datetime(2024, 2, 29, 1, 2, 3, tzinfo=UTC), datetime(1900, 1, 1, tzinfo=UTC)],
}


@pytest.mark.parametrize("key_type", KEYS)
def test_keys_of_every_type_come_back_as_they_were(store: Store, key_type: str) -> None:
    keys = KEYS[key_type]
    points = batch(keys)
    vector_set = loaded(store, points, key_type=key_type)
    store.upsert(vector_set, points)
    expected = {encode_key(key) for key in keys}
    stored = [point.key for point in store.fingerprints(vector_set, 0, None)]
    assert {encode_key(key) for key in stored} == expected
    assert len(stored) == len(keys)
    assert store.vectors(vector_set, keys).keys() == set(keys)
    hits = store.search(vector_set, SearchRequest(points.vectors[0], limit=len(keys)))
    assert {encode_key(hit.key) for hit in hits} == expected
    assert hits[0].key == keys[0]
    store.delete(vector_set, keys[:1])
    assert store.count(vector_set) == len(keys) - 1


def test_fingerprints_by_bucket(store: Store) -> None:
    keys: list[Key] = list(range(3000))
    points = batch(keys)
    vector_set = loaded(store, points)
    by_key = {key: (row_hash, bucket) for key, row_hash, bucket in store.fingerprints(vector_set, 0, None)}
    assert by_key == dict(zip(keys, zip(points.row_hashes, points.buckets, strict=True), strict=True))

    def check() -> None:
        for bits, wanted in [
            (0, [0]),
            (3, [0, 7]),
            (8, list(range(0, 256, 2))),
            (8, [4, 5, 6]),
            (16, [0, 9973]),
            (4, []),
        ]:
            found = [point.key for point in store.fingerprints(vector_set, bits, wanted)]
            expected = [k for k, bucket in zip(keys, points.buckets, strict=True) if bucket >> (16 - bits) in wanted]
            assert sorted(found) == expected, (bits, wanted)

    check()
    store.finish_load(vector_set)
    check()


def test_vectors_for_reuse(store: Store) -> None:
    points = batch([1, 2, 3])
    vector_set = loaded(store, points)
    found = store.vectors(vector_set, [3, 1, 77])
    assert found.keys() == {1, 3}
    hashed, vector = found[3]
    assert hashed == text_hash("text 3")
    assert (vector.dtype, vector.shape) == (np.float32, (DIMENSIONS,))
    assert cosines(vector[None], points.vectors[2])[0] == pytest.approx(1, abs=1e-6)


def test_search_orders_by_cosine(store: Store) -> None:
    points = batch(list(range(200)))
    vector_set = loaded(store, points)
    store.finish_load(vector_set)
    query = np.random.default_rng(9).standard_normal(DIMENSIONS).astype(np.float32)
    expected = cosines(points.vectors, query)
    hits = store.search(vector_set, SearchRequest(query, limit=20))
    assert [hit.key for hit in hits] == list(np.argsort(-expected)[:20])
    assert [hit.similarity_score for hit in hits] == pytest.approx(sorted(expected, reverse=True)[:20], abs=1e-5)
    least = hits[4].similarity_score
    assert store.search(vector_set, SearchRequest(query, limit=20, minimum_score=least)) == hits[:5]
    assert len(store.search(vector_set, SearchRequest(query, limit=500))) == 200
    assert store.search(vector_set, SearchRequest(query, limit=1)) == hits[:1]


def test_equal_scores_are_ordered_by_key(store: Store) -> None:
    vector_set = loaded(store, batch(["c", "a", "b"], vectors=np.ones((3, DIMENSIONS), np.float32)), key_type="text")
    hits = store.search(vector_set, SearchRequest(np.ones(DIMENSIONS, np.float32), limit=3))
    assert [hit.key for hit in hits] == ["a", "b", "c"]


def test_a_vector_of_zeros_is_kept_and_never_found(store: Store) -> None:
    vectors = np.zeros((5, DIMENSIONS), np.float32)
    vectors[0, 0] = 1
    vectors[1, 1] = 1  # orthogonal to the question, and found
    vectors[2, 0] = -1
    vector_set = loaded(store, batch([0, 1, 2, 3, 4], vectors=vectors))
    assert store.count(vector_set) == 5
    query = vectors[0]
    assert [hit.key for hit in store.search(vector_set, SearchRequest(query, limit=3))] == [0, 1, 2]
    store.finish_load(vector_set)
    assert [hit.key for hit in store.search(vector_set, SearchRequest(query, limit=5))] == [0, 1, 2]
    assert [round(hit.similarity_score, 5) for hit in store.search(vector_set, SearchRequest(query, limit=3))] == [
        1,
        0,
        -1,
    ]
    assert store.search(vector_set, SearchRequest(np.zeros(DIMENSIONS, np.float32), limit=3)) == []


def test_search_returns_only_what_the_filter_matches_and_all_of_it(store: Store) -> None:
    count = 3000
    metadata = [{"color": "rare" if index % 500 == 0 else "common", "price": float(index)} for index in range(count)]
    points = batch(list(range(count)), metadata=metadata)
    vector_set = loaded(store, points)
    store.finish_load(vector_set)
    query = points.vectors[17]
    scores = cosines(points.vectors, query)

    def expected(keys: list[int]) -> list[int]:
        return sorted(keys, key=lambda key: -scores[key])[:10]

    for raw, keys in [
        ({"color": "rare"}, list(range(0, count, 500))),
        ({"color": {"neq": "common"}, "price": {"gte": 500}}, list(range(500, count, 500))),
        ({"price": {"gte": 100, "lt": 2900}}, list(range(100, 2900))),
        ({"color": {"exists": False}}, []),
    ]:
        tree = parse_filter(raw, vector_set.filter_types)
        assert [hit.key for hit in store.search(vector_set, SearchRequest(query, limit=10, filter=tree))] == expected(
            keys
        )


def test_any_column_name_and_value_can_be_stored_and_filtered(store: Store) -> None:
    types = dict.fromkeys(HOSTILE_NAMES, FilterType.KEYWORD) | {"number %s": FilterType.FLOAT}
    values = ["", " ", "'; DROP TABLE x; --", '{"a": 1}', "%s%(x)s", "\\u0000", "ü", "x" * 5000, "null", "\ttab\n"]
    metadata: list[object] = [dict.fromkeys(HOSTILE_NAMES, value) | {"number %s": 1.5} for value in values]
    points = batch(list(range(len(values))), metadata=metadata)
    vector_set = loaded(store, points, filter_types=types)
    store.finish_load(vector_set)
    assert [hit.metadata for hit in store.search(vector_set, SearchRequest(points.vectors[3], limit=1))] == [
        metadata[3]
    ]
    for name in HOSTILE_NAMES:
        for index, value in enumerate(values):
            tree = parse_filter({name: value, "number %s": {"gt": 1}}, types)
            found = [
                hit.key for hit in store.search(vector_set, SearchRequest(points.vectors[0], limit=50, filter=tree))
            ]
            assert found == [index], (name, value)


def test_a_batch_of_wide_metadata_is_written(store: Store) -> None:
    """50 MB, which no request to Qdrant may have; and values that differ, which no index could hold as they are."""
    values = [random.Random(number).randbytes(100_000).hex() for number in range(256)]
    points = batch(list(range(256)), metadata=[{"color": value, "price": 1.5} for value in values])
    vector_set = loaded(store, points)
    store.finish_load(vector_set)
    assert store.count(vector_set) == 256
    wanted = parse_filter({"color": {"neq": "red"}, "price": 1.5}, FILTER_TYPES)
    hit = store.search(vector_set, SearchRequest(points.vectors[9], limit=3, filter=wanted))[0]
    assert (hit.key, hit.metadata) == (9, {"color": values[9], "price": 1.5})


def test_text_that_no_store_can_hold_is_cleaned(store: Store) -> None:
    points = batch([1], texts=["a\x00b\ud800"], metadata=[{"color": "c\x00d\udfff", "price": None}])
    hit = store.search(loaded(store, points), SearchRequest(points.vectors[0], limit=1))[0]
    assert hit.embedded_text.replace("\x00", "") == "ab\ufffd"
    assert {name: value.replace("\x00", "") for name, value in hit.metadata.items()} == {"color": "cd\ufffd"}


def test_versions_are_listed_and_dropped_one_by_one(store: Store) -> None:
    first = loaded(store, batch([1]))
    others = [new_set(version=version, like=first) for version in (2, 10)]
    for other in others:
        store.create(other)
    store.create(new_set())  # of another vector table
    assert store.versions(first.vector_table_id) == [1, 2, 10]
    store.publish(others[0])
    store.drop(first.vector_table_id, 2)
    store.drop(first.vector_table_id, 2)
    assert store.versions(first.vector_table_id) == [1, 10]
    store.drop_public_name(first.vector_table_id, first.public_name)


def test_publishing_switches_while_readers_read(store: Store, read_public: Callable[[VectorSet], set[str]]) -> None:
    """Readers of the public name see one set or the other, whole, and never an error, also when dimensions change."""
    sets = []
    for version in range(1, 5):
        vector_set = new_set(version=version, dimensions=3 + version, like=sets[0] if sets else None)
        store.create(vector_set)
        texts = [f"v{version}"] * 50
        store.upsert(vector_set, batch(list(range(50)), dimensions=3 + version, texts=texts))
        store.finish_load(vector_set)
        sets.append(vector_set)
    store.publish(sets[0])
    seen: list[str] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                texts = read_public(sets[0])
                assert len(texts) == 1
                seen.extend(texts)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for vector_set in sets * 3:
        store.publish(vector_set)
        store.publish(vector_set)
        read_before = len(seen)
        while len(seen) < read_before + 4 and not failures:
            time.sleep(0.001)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert read_public(sets[0]) == {"v4"}
    assert set(seen) == {"v1", "v2", "v3", "v4"}
    store.drop(sets[0].vector_table_id, 1)
    assert read_public(sets[0]) == {"v4"}
    store.drop_public_name(sets[0].vector_table_id, sets[0].public_name)
    store.drop_public_name(sets[0].vector_table_id, sets[0].public_name)
    with pytest.raises(AssertionError):
        read_public(sets[0])


@pytest.fixture
def read_public(store: Store, request: pytest.FixtureRequest) -> Callable[[VectorSet], set[str]]:
    """The distinct texts of 20 points that a user of the public name sees."""
    if isinstance(store, ToyStore):

        def read_toy(vector_set: VectorSet) -> set[str]:
            try:
                return set(store.data.read_public(vector_set.public_name)[:20])
            except KeyError as error:
                raise AssertionError from error

        return read_toy
    if type(store).__name__ == "QdrantStore":
        import httpx

        url = request.getfixturevalue("qdrant_url")

        def read_alias(vector_set: VectorSet) -> set[str]:
            path = f"{url}/collections/{vector_set.public_name}/points/scroll"
            answer = httpx.post(path, json={"limit": 20, "with_payload": ["embedded_text"]})
            assert answer.status_code == 200, answer.text
            return {point["payload"]["embedded_text"] for point in answer.json()["result"]["points"]}

        return read_alias
    import psycopg

    url = request.getfixturevalue("database_url")

    def read_view(vector_set: VectorSet) -> set[str]:
        with psycopg.connect(url) as connection:
            try:
                query = f'SELECT embedded_text FROM "embedd_{vector_set.public_name}" LIMIT 20'
                return {text for (text,) in connection.execute(query).fetchall()}
            except psycopg.Error as error:
                raise AssertionError from error

    return read_view


def test_several_threads_write_at_once(store: Store) -> None:
    vector_set = new_set()
    store.create(vector_set)
    failures: list[BaseException] = []

    def write(thread: int) -> None:
        try:
            for start in range(0, 400, 100):
                own = list(range(thread * 1000 + start, thread * 1000 + start + 100))
                store.upsert(vector_set, batch([*own, 1, 2, 3]))  # three keys that everybody writes
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.count(vector_set) == 4 * 400 + 3


def test_writes_during_and_after_the_index_build_are_found(store: Store) -> None:
    vector_set = loaded(store, batch(list(range(500))))
    store.finish_load(vector_set)
    store.finish_load(vector_set)
    extra = batch([1000], seed=77)
    store.upsert(vector_set, extra)
    assert store.search(vector_set, SearchRequest(extra.vectors[0], limit=1))[0].key == 1000
    store.delete(vector_set, [1000])
    assert store.search(vector_set, SearchRequest(extra.vectors[0], limit=1))[0].key != 1000


def test_info_names_the_place(store: Store) -> None:
    vector_set = loaded(store, batch([1]))
    assert vector_set.versioned_name in " ".join(str(value) for value in store.info(vector_set).values())


def test_recall_at_20_000_points(store: Store) -> None:
    count, dimensions = 20_000, 64
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((200, dimensions))
    vectors = (centres[rng.integers(0, 200, count)] + 0.5 * rng.standard_normal((count, dimensions))).astype(np.float32)
    vector_set = new_set(dimensions=dimensions)
    store.create(vector_set)
    for start in range(0, count, 2000):
        keys: list[Key] = list(range(start, start + 2000))
        store.upsert(vector_set, batch(keys, vectors=vectors[start : start + 2000]))  # type: ignore[arg-type]
    store.finish_load(vector_set)
    assert store.count(vector_set) == count
    found = 0
    for query in vectors[rng.integers(0, count, 50)] + 0.3 * rng.standard_normal((50, dimensions)).astype(np.float32):
        nearest = set(np.argsort(-cosines(vectors, query))[:10].tolist())
        found += len(nearest & {hit.key for hit in store.search(vector_set, SearchRequest(query, limit=10))})
    assert found / 500 >= 0.95


CALLS: dict[str, Callable[[Store, VectorSet], object]] = {
    "check": lambda store, _: store.check(),
    "create": lambda store, vector_set: store.create(vector_set),
    "upsert": lambda store, vector_set: store.upsert(vector_set, batch([1])),
    "delete": lambda store, vector_set: store.delete(vector_set, [1]),
    "fingerprints": lambda store, vector_set: list(store.fingerprints(vector_set, 0, None)),
    "vectors": lambda store, vector_set: store.vectors(vector_set, [1]),
    "finish_load": lambda store, vector_set: store.finish_load(vector_set),
    "count": lambda store, vector_set: store.count(vector_set),
    "search": lambda store, vector_set: store.search(
        vector_set, SearchRequest(np.ones(DIMENSIONS, np.float32), limit=1)
    ),
    "publish": lambda store, vector_set: store.publish(vector_set),
    "versions": lambda store, vector_set: store.versions(vector_set.vector_table_id),
    "drop": lambda store, vector_set: store.drop(vector_set.vector_table_id, 1),
    "drop_public_name": lambda store, vector_set: store.drop_public_name(vector_set.vector_table_id, "x"),
    "info": lambda store, vector_set: store.info(vector_set),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["qdrant", "pgvector"])
def test_a_store_that_is_down_is_transient(kind: str, call: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    credentials = {"host": "127.0.0.1", "port": port, "database": "d", "user": "u", "password": "p@:/%w"}
    down = (
        QdrantStore(f"http://127.0.0.1:{port}") if kind == "qdrant" else open_platform_store("postgresql", credentials)
    )
    with down, pytest.raises(VectorStoreUnavailable) as caught:
        CALLS[call](down, new_set())
    down.close()
    assert "p@:/%w" not in str(caught.value)


def test_unknown_platforms_are_named() -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_platform_store("oracle", {})
    assert "postgresql" in (caught.value.resolution or "")
