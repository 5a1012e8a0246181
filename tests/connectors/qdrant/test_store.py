"""What is Qdrant's alone: its wire, its answers other than 200, payload keys, and waiting for the index."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.connectors.qdrant import indexing as qdrant_indexing
from embedd_dagster.connectors.qdrant import points as qdrant_points
from embedd_dagster.connectors.qdrant.filters import column_name, compile_filter, payload_key, payload_path
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.filters import Condition, Operator
from embedd_dagster.core.ranking import bucket_ranges
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import (
    ConfigurationError,
    EmbeddError,
    RunCancelled,
    VectorStoreRejected,
    VectorStoreUnavailable,
)
from embedd_dagster.protocols.store import ReportIndexed, SearchRequest, ignore_report
from embedd_dagster.stack.qdrant.server import MAX_BODY_BYTES

SET = VectorSet("vt_abcdefgh", 1, "vt_abcdefgh_things", 4, {"color": FilterType.KEYWORD})
Handler = Callable[[httpx.Request], httpx.Response]


def ok(result: Any) -> httpx.Response:
    return httpx.Response(200, json={"result": result, "status": "ok", "time": 0})


def opened(handler: Handler, url: str = "http://qdrant:6333", api_key: str | None = None) -> QdrantStore:
    return QdrantStore(url, api_key, transport=httpx.MockTransport(handler))


def points(count: int, text: str = "t") -> PointBatch:
    vectors = np.ones((count, 4), np.float32)
    return PointBatch([*range(count)], [text] * count, [{}] * count, [0] * count, [0] * count, [0] * count, vectors)


@pytest.mark.parametrize("url", ["qdrant:6333", "ftp://x", "http://", "", "http://[::"])
def test_what_is_no_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError):
        QdrantStore(url)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, VectorStoreRejected), (401, VectorStoreRejected), (403, VectorStoreRejected), (404, VectorStoreRejected),
        (409, VectorStoreRejected), (413, VectorStoreRejected), (422, VectorStoreRejected),
        (408, VectorStoreUnavailable), (429, VectorStoreUnavailable), (500, VectorStoreUnavailable),
        (502, VectorStoreUnavailable), (503, VectorStoreUnavailable), (504, VectorStoreUnavailable),
    ],
)  # fmt: skip
def test_every_answer_becomes_one_of_our_errors(status: int, kind: type[EmbeddError]) -> None:
    body = {"status": {"error": 'Wrong input: "a row\'s content" is bad ' + "x" * 1000}}
    store = opened(lambda _: httpx.Response(status, json=body, headers={"retry-after": "7"}))
    with pytest.raises(kind) as caught:
        store.check()
    assert "a row's content" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if isinstance(caught.value, VectorStoreUnavailable):
        assert caught.value.retry_after_seconds == 7
    if status in (401, 403):
        assert "EMBEDD_QDRANT_API_KEY" in caught.value.resolution


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError,
        httpx.ReadTimeout,
        httpx.ConnectTimeout,
        httpx.PoolTimeout,
        httpx.RemoteProtocolError,
        httpx.ReadError,
    ],
)
def test_every_failure_of_the_transport_is_transient(failure: type[httpx.TransportError]) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure("key=secret", request=request)

    with pytest.raises(VectorStoreUnavailable) as caught:
        opened(fail, api_key="secret").check()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"x": 1}', b""])
def test_something_else_at_the_address_is_told(content: bytes) -> None:
    with pytest.raises(VectorStoreRejected, match="does not speak"):
        opened(lambda _: httpx.Response(200, content=content)).check()


def test_the_api_key_and_a_path_prefix_are_sent() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return ok({"collections": []})

    opened(handler, "https://cloud.example/prefix", "k3y").check()
    assert seen[0].headers["api-key"] == "k3y"
    assert str(seen[0].url) == "https://cloud.example/prefix/collections/embedd/exists"


def test_large_batches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_points, "BODY_BYTES", 5000)
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        assert request.url.params["wait"] == "true"
        return ok({})

    opened(handler).upsert(SET, points(20, text="x" * 500))
    sent = [orjson.loads(body)["batch"] for body in bodies]
    assert len(sent) > 3
    assert [payload["pk"] for part in sent for payload in part["payloads"]] == list(range(20))
    assert max(map(len, bodies)) < 5000
    bodies.clear()
    opened(handler).upsert(SET, points(2, text="x" * 50_000))  # a point that is too large is sent alone
    assert len(bodies) == 2


@pytest.mark.parametrize("value", ["x" * 200_000, "\x01" * 200_000, "\U0001f600" * 200_000, "ü" * 1_000_000])
def test_no_body_is_above_the_limit_of_qdrant(value: str) -> None:
    """Whatever the metadata: also characters that take six bytes of JSON."""
    bodies: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(len(request.content))
        return ok({})

    given = points(64)
    given.metadata = [{"color": value}] * 64
    opened(handler).upsert(SET, given)
    assert max(bodies) <= MAX_BODY_BYTES
    assert len(bodies) > 1


def test_what_was_sent_is_let_go_at_once() -> None:
    """Not only when garbage is collected: a load that wrote bodies of 4 MB came to 790 MB by them."""
    sent: list[weakref.ref[httpx.Request]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(weakref.ref(request))
        return ok({})

    gc.disable()
    try:
        opened(handler).upsert(SET, points(1))
        assert [request() for request in sent] == [None]
    finally:
        gc.enable()


def test_numbers_and_names_of_metadata_count() -> None:
    names = [f"column {number} of a name that is long, as names may be" for number in range(200)]
    wide = VectorSet("vt_abcdefgh", 1, "vt_abcdefgh_things", 4, dict.fromkeys(names, FilterType.FLOAT))
    given = points(2000)
    given.metadata = [dict.fromkeys(names, -1.2345678901234567e-300)] * 2000
    sizes = [len(qdrant_points.upsert_body(wide, given, part)) for part in qdrant_points.split_batch(wide, given)]
    assert max(sizes) <= qdrant_points.BODY_BYTES


def run_finish_load(
    monkeypatch: pytest.MonkeyPatch,
    states: list[dict[str, Any]],
    threshold: int = 0,
    report: ReportIndexed = ignore_report,
) -> list[str]:
    monkeypatch.setattr(qdrant_indexing, "_POLL_SECONDS", 0)
    calls: list[str] = []
    first = {"status": "green", "config": {"optimizer_config": {"indexing_threshold": threshold}}}
    remaining = iter([first, *states])

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/index"):
            return ok({})
        calls.append(request.method)
        return ok(True if request.method == "PATCH" else next(remaining))

    opened(handler).finish_load(SET, report)
    return calls


MANY = 2_000_000  # points, of 4 dimensions: enough for an index


def test_a_small_collection_is_ready_when_it_is_green(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{"status": "yellow", "points_count": 5}, {"status": "green", "points_count": 5}]
    assert run_finish_load(monkeypatch, states) == ["GET", "PATCH", "GET", "GET"]


def test_a_large_collection_must_stay_green_as_the_optimizer_may_not_have_looked_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["green", "yellow", "green", "green", "grey", "green", "green", "green"]
    calls = run_finish_load(monkeypatch, [{"status": name, "points_count": MANY} for name in names])
    assert calls.count("GET") == len(names) + 1
    assert calls.count("PATCH") == 2  # grey wants a nudge


def test_an_index_build_that_runs_is_not_cancelled_by_a_repeated_call(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{"status": "yellow", "points_count": 5}, {"status": "green", "points_count": 5}]
    calls = run_finish_load(monkeypatch, states, threshold=qdrant_indexing.INDEXING_THRESHOLD_KB)
    assert "PATCH" not in calls


def test_a_build_that_shows_no_progress_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_indexing, "_STALLED_SECONDS", -1)
    yellow = {"status": "yellow", "points_count": MANY, "indexed_vectors_count": 0}
    green = {"status": "green", "points_count": MANY, "indexed_vectors_count": MANY}
    run_finish_load(monkeypatch, [yellow] * 50 + [green] * 3)


def test_a_collection_that_stays_grey_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant_indexing, "_STALLED_SECONDS", -1)
    with pytest.raises(VectorStoreUnavailable, match="grey"):
        run_finish_load(monkeypatch, [{"status": "grey"}] * 2)


def red(indexed: int) -> dict[str, Any]:
    error = "Service internal error: No space left on device"
    return {
        "status": "red", "points_count": MANY, "indexed_vectors_count": indexed, "optimizer_status": {"error": error},
    }  # fmt: skip


def test_a_failed_index_is_told_with_its_reason_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VectorStoreRejected, match="No space left on device") as caught:
        run_finish_load(monkeypatch, [red(0)] * 30)
    assert "restart Qdrant" in caught.value.resolution


def test_an_error_that_passes_does_not_fail_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    green = {"status": "green", "points_count": MANY}
    calls = run_finish_load(monkeypatch, [red(0), red(0), {"status": "yellow"}, green, green, green])
    assert calls.count("PATCH") == 2  # the second has the optimizer try again


def test_an_old_error_does_not_matter_once_the_index_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    run_finish_load(monkeypatch, [red(MANY)])


def test_too_few_hits_are_looked_for_again_exactly() -> None:
    asked: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        body = orjson.loads(request.content)
        asked.append(body)
        found = 3 if body["params"]["exact"] else 1
        payload = {"pk": "i:1", "embedded_text": "t", "metadata": {}}
        return ok({"points": [{"id": str(index), "score": 0.5, "payload": payload} for index in range(found)]})

    assert len(opened(handler).search(SET, SearchRequest(np.ones(4, np.float32), limit=5))) == 3
    assert [body["params"]["exact"] for body in asked] == [False, True]
    assert asked[0]["params"]["acorn"]["enable"], "fields have no links of their own in the graph"


def test_the_alias_is_replaced_in_one_action() -> None:
    sent: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return ok({"aliases": [{"alias_name": SET.public_name, "collection_name": f"{SET.vector_table_id}_v7"}]})
        sent.append(orjson.loads(request.content))
        return ok(True)

    opened(handler).publish(SET)
    create = {"create_alias": {"collection_name": SET.versioned_name, "alias_name": SET.public_name}}
    assert sent == [{"actions": [create]}]


def test_no_answer_is_asked_for_compressed() -> None:
    """A real server sends the last chunk 40 ms later."""
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["accept-encoding"])
        return ok({"collections": []})

    opened(handler).check()
    assert set(seen) == {"identity"}


@pytest.mark.parametrize("failure", [httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError])
def test_a_call_that_meets_a_closing_connection_is_sent_once_more(failure: type[httpx.TransportError]) -> None:
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise failure("closed", request=request)
        return ok({"count": 3})

    assert opened(handler).count(SET) == 3
    assert calls == 2


@pytest.mark.parametrize("key", ["k3y\n", "  k3y", "\tk3y\r\n"])
def test_blanks_around_the_api_key_are_not_sent(key: str) -> None:
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["api-key"])
        return ok({"collections": []})

    opened(handler, api_key=key).check()
    assert set(seen) == {"k3y"}


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel", "nul\x00"])
def test_an_api_key_that_cannot_be_one_is_a_configuration_error(key: str) -> None:
    with pytest.raises(ConfigurationError, match="EMBEDD_QDRANT_API_KEY"):
        opened(lambda _: ok({}), api_key=key)


def test_a_key_that_is_asked_for_and_not_set_is_told() -> None:
    with pytest.raises(VectorStoreRejected, match="none is set"):
        opened(lambda _: httpx.Response(401, text="Must provide an API key")).check()


def test_a_locked_server_is_told_with_its_own_words() -> None:
    body = {"status": {"error": "Forbidden: Write operations are locked for maintenance"}}
    with pytest.raises(VectorStoreRejected, match="locked for maintenance") as caught:
        opened(lambda _: httpx.Response(403, json=body), api_key="k").check()
    assert "not locked" in caught.value.resolution


def test_parameter_names_are_shown_and_values_are_not() -> None:
    error = 'Bad request: Limit exceeded 9 > 3 for "limit" near "Jane Doe". Help: Reduce the "limit" parameter.'
    answer = httpx.Response(400, json={"status": {"error": error}})
    with pytest.raises(VectorStoreRejected) as caught:
        opened(lambda request: ok({}) if request.method == "GET" else answer).count(SET)
    assert '"limit"' in caught.value.message
    assert "Jane" not in caught.value.message
    assert "strict_mode_config" in caught.value.resolution


def answering_version(version: str) -> Handler:
    return lambda request: (
        httpx.Response(200, json={"version": version}) if request.url.path == "/" else ok({"collections": []})
    )


@pytest.mark.parametrize("version", ["1.9.7", "0.11.0"])
def test_a_server_that_is_too_old_is_told(version: str) -> None:
    with pytest.raises(VectorStoreRejected, match=version) as caught:
        opened(answering_version(version)).check()
    assert "1.17" in caught.value.resolution


@pytest.mark.parametrize("version", ["1.10.0", "1.16.3", "1.17.1", "2.0.0-dev", "unknown"])
def test_every_other_version_is_taken(version: str) -> None:
    opened(answering_version(version)).check()


def test_an_alias_of_somebody_else_is_not_taken(qdrant_url: str) -> None:
    foreign = VectorSet("vt_foreign00", 1, "vt_shared_name", 4, {})
    own = VectorSet("vt_own000000", 1, "vt_shared_name", 4, {})
    with QdrantStore(qdrant_url) as store:
        try:
            store.create(foreign)
            store.create(own)
            store.publish(foreign)
            with pytest.raises(VectorStoreRejected, match="vt_shared_name"):
                store.publish(own)
            with pytest.raises(VectorStoreRejected):
                store.drop_public_name(own.vector_table_id, own.public_name)
        finally:
            store.drop(foreign.vector_table_id, 1)
            store.drop(own.vector_table_id, 1)


def test_two_creates_at_once_both_succeed(qdrant_url: str) -> None:
    raced = VectorSet("vt_raced0000", 1, "vt_raced0000_x", 4, {"color": FilterType.KEYWORD})
    failures: list[BaseException] = []
    with QdrantStore(qdrant_url) as store:

        def create() -> None:
            try:
                store.create(raced)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=create) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.drop(raced.vector_table_id, 1)
    assert failures == []


NAMES = st.text(st.sampled_from('a%25C"\\.[]'), max_size=8) | st.text(max_size=8)


@given(first=NAMES, second=NAMES)
def test_every_column_has_a_payload_key_of_its_own(first: str, second: str) -> None:
    assert column_name(payload_key(first)) == first
    assert (payload_key(first) == payload_key(second)) == (first == second)
    assert payload_path(first).count('"') == 2
    assert "\\" not in payload_path(first)


def test_plain_names_stay_as_they_are() -> None:
    for name in ("price", "my.col", "a b", "50%", "a[0]"):
        assert payload_key(name) == name


def test_beyond_exact_doubles_integers_that_round_alike_are_named() -> None:
    types = {"n": FilterType.INTEGER}
    assert compile_filter(Condition("n", Operator.GT, 5), types) == {
        "must": [{"key": 'metadata."n"', "range": {"gt": 5}}],
    }
    bound = compile_filter(Condition("n", Operator.GTE, 9007199254740991), types)["must"][0]["range"]["gte"]
    assert type(bound) is int, "the server's parser reads the digits of a double as a neighbour"
    compiled = compile_filter(Condition("n", Operator.GT, 2**53), types)
    assert compiled["must_not"][0]["match"]["any"] == [2**53, 2**53 + 1]


def test_bucket_ranges_are_joined() -> None:
    assert bucket_ranges([3, 1, 2, 2, 7], 8, 16) == [(256, 1023), (1792, 2047)]
    assert bucket_ranges([0], 0, 16) == [(0, 65535)]
    assert bucket_ranges([], 4, 16) == []


def test_the_index_stage_reports_how_many_vectors_qdrant_has_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, int]] = []
    states = [
        {"status": "yellow", "points_count": 9, "indexed_vectors_count": 4},
        {"status": "green", "points_count": 9, "indexed_vectors_count": 9},
    ]
    run_finish_load(monkeypatch, states, report=lambda indexed, total: reported.append((indexed, total)))
    assert reported == [(4, 9), (9, 9)]


def test_a_run_that_is_cancelled_does_not_wait_for_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(indexed: int, total: int) -> None:
        if indexed:
            raise RunCancelled("Somebody asked for it.")

    states = [{"status": "yellow", "points_count": 9, "indexed_vectors_count": number} for number in (0, 1)]
    with pytest.raises(RunCancelled):
        run_finish_load(monkeypatch, states, report=report)
