"""Bulk calls over gRPC: when they are made, what their refusals become, and what happens without them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from embedd_dagster.connectors.qdrant.messages import fill_payload, message_class, read_payload, read_vector
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable

SET = VectorSet("vt_abcdefgh", 1, "vt_abcdefgh_things", 4, {})
EXISTS = message_class("CollectionExistsResponse")
Answer = Callable[[grpc.ServicerContext], bytes]


def points(*texts: str) -> PointBatch:
    count, vectors = len(texts), np.eye(4, dtype=np.float32)[: len(texts)]
    return PointBatch([*range(count)], [*texts], [{}] * count, [0] * count, [0] * count, [0] * count, vectors)


@dataclass
class FakeGrpc:
    """A gRPC server that answers every call as it is set to."""

    exists: bool = True
    upsert: Answer = lambda _: b""
    calls: list[str] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    port: int = 0

    def service(self, details: Any) -> Any:
        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            name = details.method.rpartition("/")[2]
            self.calls.append(name)
            self.keys.append(dict(context.invocation_metadata()).get("api-key"))
            if name == "CollectionExists":
                return EXISTS(result={"exists": self.exists}).SerializeToString()
            return self.upsert(context)

        return grpc.unary_unary_rpc_method_handler(answer)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, fake: FakeGrpc) -> None:
        self._fake = fake

    def service(self, handler_call_details: Any) -> Any:
        return self._fake.service(handler_call_details)


@pytest.fixture
def fake() -> Iterator[FakeGrpc]:
    made = FakeGrpc()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((_Handlers(made),))
    made.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made
    server.stop(0).wait()


@dataclass
class FakeRest:
    """Qdrant's REST side: every collection exists, every write succeeds."""

    exists: bool = True
    calls: list[str] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(f"{request.method} {request.url.path.rpartition('/')[2]}")
        return httpx.Response(200, json={"result": {"exists": self.exists}, "status": "ok"})


def opened(port: int | None, rest: Callable[[httpx.Request], httpx.Response], key: str | None = None) -> QdrantStore:
    return QdrantStore("http://127.0.0.1:6333", key, grpc_port=port, transport=httpx.MockTransport(rest))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_writes_go_over_grpc_with_the_api_key(fake: FakeGrpc) -> None:
    rest = FakeRest()
    with opened(fake.port, rest, "k3y") as store:
        store.upsert(SET, points("a"))
        store.upsert(SET, points("b"))
    assert fake.calls == ["CollectionExists", "Upsert", "Upsert"]
    assert set(fake.keys) == {"k3y"}
    assert rest.calls == []


@pytest.mark.parametrize("port", [None, 0])
def test_without_a_port_writes_go_over_rest_and_nothing_is_logged(port: int | None) -> None:
    rest = FakeRest()
    with capture_logs() as logs, opened(port, rest) as store:
        store.upsert(SET, points("a"))
    assert (rest.calls, logs) == (["PUT points"], [])


def test_a_port_that_cannot_be_reached_is_logged_once_and_rest_is_used() -> None:
    rest = FakeRest()
    with capture_logs() as logs, opened(closed_port(), rest) as store:
        for _ in range(3):
            store.upsert(SET, points("a"))
    assert rest.calls.count("PUT points") == 3
    assert len(logs) == 1
    assert "EMBEDD_QDRANT_GRPC_PORT" in logs[0]["advice"]


def test_a_grpc_port_of_another_qdrant_is_not_written_to(fake: FakeGrpc) -> None:
    fake.exists = False
    rest = FakeRest()
    with capture_logs() as logs, opened(fake.port, rest) as store:
        store.upsert(SET, points("a"))
    assert "Upsert" not in fake.calls
    assert "PUT points" in rest.calls
    assert "another Qdrant" in logs[0]["problem"]


def test_nothing_is_decided_while_qdrant_is_down(fake: FakeGrpc) -> None:
    down = True

    def rest(request: httpx.Request) -> httpx.Response:
        if down:
            raise httpx.ConnectError("down", request=request)
        return FakeRest()(request)

    fake.exists = False
    with opened(fake.port, rest) as store:
        with pytest.raises(VectorStoreUnavailable):
            store.upsert(SET, points("a"))
        down, fake.exists = False, True
        store.upsert(SET, points("a"))
    assert fake.calls[-1] == "Upsert"


def test_nothing_is_decided_by_a_collection_that_does_not_exist(fake: FakeGrpc) -> None:
    rest = FakeRest(exists=False)
    fake.exists = False
    with capture_logs() as logs, opened(fake.port, rest) as store:
        store.upsert(SET, points("a"))
        fake.exists = True
        store.upsert(SET, points("a"))
    assert (fake.calls[-1], logs) == ("Upsert", [])


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, VectorStoreUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, VectorStoreUnavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, VectorStoreUnavailable),
        (grpc.StatusCode.INTERNAL, VectorStoreUnavailable),
        (grpc.StatusCode.UNKNOWN, VectorStoreUnavailable),
        (grpc.StatusCode.INVALID_ARGUMENT, VectorStoreRejected),
        (grpc.StatusCode.NOT_FOUND, VectorStoreRejected),
        (grpc.StatusCode.OUT_OF_RANGE, VectorStoreRejected),
        (grpc.StatusCode.UNIMPLEMENTED, VectorStoreRejected),
        (grpc.StatusCode.UNAUTHENTICATED, VectorStoreRejected),
        (grpc.StatusCode.PERMISSION_DENIED, VectorStoreRejected),
    ],
)
def test_every_refusal_becomes_one_of_our_errors(
    fake: FakeGrpc, code: grpc.StatusCode, kind: type[VectorStoreRejected | VectorStoreUnavailable]
) -> None:
    def refuse(context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("retry-after", "7"),))
        context.abort(code, 'Wrong input: "a row\'s content" is bad ' + "x" * 1000)
        raise AssertionError

    fake.upsert = refuse
    with opened(fake.port, FakeRest(), "k3y") as store, pytest.raises(kind) as caught:
        store.upsert(SET, points("a"))
    assert "a row's content" not in str(caught.value)
    assert "k3y" not in str(caught.value)
    assert len(str(caught.value)) < 450
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert caught.value.retry_after_seconds == 7
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        assert "EMBEDD_QDRANT_API_KEY" in caught.value.resolution


def test_a_call_that_loses_its_connection_is_sent_once_more(fake: FakeGrpc) -> None:
    def fail_once(context: grpc.ServicerContext) -> bytes:
        if fake.calls.count("Upsert") == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
        return b""

    fake.upsert = fail_once
    with opened(fake.port, FakeRest()) as store:
        store.upsert(SET, points("a"))
    assert fake.calls.count("Upsert") == 2


def test_two_threads_decide_once(fake: FakeGrpc) -> None:
    with opened(fake.port, FakeRest()) as store:
        threads = [threading.Thread(target=store.upsert, args=(SET, points("a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (fake.calls.count("CollectionExists"), fake.calls.count("Upsert")) == (1, 8)


def test_another_process_opens_a_channel_of_its_own(fake: FakeGrpc, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    insecure_channel = grpc.insecure_channel
    monkeypatch.setattr(grpc, "insecure_channel", lambda *given: made.append(given[0]) or insecure_channel(*given))
    with opened(fake.port, FakeRest()) as store:
        assert made == [], "nothing is opened before the first bulk call"
        store.upsert(SET, points("a"))
        store.upsert(SET, points("a"))
        assert len(made) == 1
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        store.upsert(SET, points("a"))
        assert len(made) == 2


def test_a_lone_surrogate_and_a_batch_above_grpcs_default_size_are_written(
    qdrant_url: str, qdrant_grpc_port: int
) -> None:
    vector_table_id = f"vt_{uuid4().hex[:26]}"
    vector_set = VectorSet(vector_table_id, 1, f"{vector_table_id[:11]}_g", 4, {})
    with capture_logs() as logs, QdrantStore(qdrant_url, grpc_port=qdrant_grpc_port) as store:
        store.create(vector_set)
        texts = ["lone \ud800 surrogate", "x" * 6_000_000, "y" * 6_000_000]
        store.upsert(vector_set, points(*texts))
        assert set(store.vectors(vector_set, [0, 1, 2, 3])) == {0, 1, 2}
        assert np.array_equal(store.vectors(vector_set, [1])[1][1], np.eye(4, dtype=np.float32)[1])
        store.drop(vector_table_id, 1)
    assert logs == []


def test_messages_carry_vectors_and_payloads_unchanged() -> None:
    payload = {
        "text": "ä",
        "count": 2**63 - 1,
        "share": 0.1,
        "flag": True,
        "none": None,
        "list": [1, {"deep": [2.5]}],
        "empty": [{}, []],
    }
    message = message_class("PointStruct")()
    fill_payload(message.payload, payload)
    vector = np.array([0.1, -2.5e-38, 3e38], dtype=np.float32)
    for place in (message.vectors.vector, message.vectors.vector.dense):
        place.data = vector.tobytes()
        read = message_class("PointStruct").FromString(message.SerializeToString())
        assert np.array_equal(read_vector(read.vectors.vector), vector)
        place.ClearField("data")
    assert read_payload(read.payload) == payload
