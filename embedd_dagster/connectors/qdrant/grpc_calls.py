"""Calls over gRPC, which carries vectors as bytes: bulk writes and reads of vectors."""

from __future__ import annotations

import os
import threading
from typing import Any, Final

import grpc
import structlog

from embedd_dagster.connectors.qdrant.client import QdrantRest
from embedd_dagster.connectors.qdrant.failures import no_answer, refusal, shown_reason, unreachable
from embedd_dagster.connectors.qdrant.messages import CollectionExistsRequest, CollectionExistsResponse
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable

_PROBE_SECONDS: Final = 5.0
_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_HTTP_STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 405,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.OUT_OF_RANGE: 413,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}
_TOO_LARGE: Final = "larger than max"
_log = structlog.get_logger(__name__)


class QdrantGrpc:
    """Calls to one Qdrant over gRPC. Safe to use from several threads; each process has a channel that it opens when needed.

    Whether gRPC is used is decided once, at the first bulk call, and logged if it is not: REST is used then.
    """

    def __init__(self, rest: QdrantRest, port: int | None) -> None:
        self._rest = rest
        self._port = port
        self._address = f"{rest.host}:{port}"
        self._lock = threading.Lock()
        self._is_used: bool | None = None if port else False
        self._channels: dict[int, grpc.Channel] = {}
        """By process: after a fork, the parent's channel must not be used, nor freed."""

    def is_used(self, vector_set: VectorSet) -> bool:
        """Whether to call over gRPC. False if it cannot be reached, refuses the key, or leads to another Qdrant.

        Raises VectorStoreUnavailable if Qdrant cannot be reached by REST either: then nothing is decided.
        """
        if self._is_used is None:
            with self._lock:
                if self._is_used is None:
                    self._is_used = self._decide(vector_set.versioned_name)
        return bool(self._is_used)

    def call(self, method: str, request: Any, answer: type[Any], *, seconds: float) -> Any:
        """The answer to a call such as `Points/Upsert`, as a message of the class `answer`.

        Every call is idempotent: if the connection is lost it is sent once more.

        Raises:
            VectorStoreUnavailable: No answer in time, no connection, a rate limit with its `retry_after_seconds`.
            SetMissing: The collection does not exist.
            LimitExceeded: Strict mode refuses the call.
            VectorStoreRejected: Any other refusal.
        """
        content = request.SerializeToString()
        try:
            return self._send(method, content, answer, seconds)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise self._failure(error) from None
        try:
            return self._send(method, content, answer, seconds)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Closes the channel of this process. Idempotent."""
        channel = self._channels.pop(os.getpid(), None)
        if channel is not None:
            channel.close()

    def _decide(self, name: str) -> bool | None:
        request = CollectionExistsRequest(collection_name=name)
        try:
            answer = self.call(
                "Collections/CollectionExists", request, CollectionExistsResponse, seconds=_PROBE_SECONDS
            )
            exists, problem = answer.result.exists, "it leads to another Qdrant, which lacks the collection"
        except (VectorStoreUnavailable, VectorStoreRejected) as error:
            exists, problem = False, error.message
        if exists:
            return True
        if not self._rest.call("GET", ("collections", name, "exists"))["exists"]:
            return None  # the collection is gone: nothing is learnt about gRPC
        _log.warning(
            "Qdrant is not used over gRPC: writes go over REST and take more CPU",
            address=self._address,
            problem=problem,
            advice="Set EMBEDD_QDRANT_GRPC_PORT to Qdrant's gRPC port, or to 0 to use REST alone.",
        )
        return False

    def _send(self, method: str, content: bytes, answer: type[Any], seconds: float) -> Any:
        key = self._rest.api_key
        send = self._open_channel().unary_unary(f"/qdrant.{method}", response_deserializer=answer.FromString)
        return send(content, timeout=seconds, metadata=(("api-key", key),) if key else ())

    def _open_channel(self) -> grpc.Channel:
        process = os.getpid()
        if (channel := self._channels.get(process)) is None:
            options = (*_OPTIONS, ("grpc.enable_http_proxy", int(self._rest.uses_proxy)))
            if self._rest.is_encrypted:
                channel = grpc.secure_channel(self._address, grpc.ssl_channel_credentials(), options)
            else:
                channel = grpc.insecure_channel(self._address, options)
            channel = self._channels.setdefault(process, channel)
        return channel

    def _failure(self, error: Any) -> VectorStoreUnavailable | VectorStoreRejected:
        code, reason = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return no_answer(self._address)
        if code is grpc.StatusCode.UNAVAILABLE:
            return unreachable(self._address, shown_reason(reason))
        status = _HTTP_STATUS.get(code, 500)
        if status == 429 and _TOO_LARGE in reason:
            status = 413
        return refusal(
            self._address,
            status,
            reason,
            has_key=self._rest.api_key is not None,
            retry_after_seconds=_retry_after(error),
        )


def _retry_after(error: Any) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after":
            try:
                return max(0.0, float(value))
            except ValueError:
                return None
    return None
