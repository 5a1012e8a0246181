"""The calls that the Qdrant connector makes over gRPC: the same collections and checks as over REST."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

import grpc
import numpy as np
import qdrant_edge as edge
import structlog

from embedd_dagster.connectors.qdrant.messages import fill_payload, message_class, read_payload, read_vector
from embedd_dagster.stack.qdrant import wire
from embedd_dagster.stack.qdrant.collections import Collection, QdrantCatalog
from embedd_dagster.stack.qdrant.point_calls import read_points, write_points
from embedd_dagster.stack.qdrant.strict_mode import RateLimitedError
from embedd_dagster.stack.qdrant.wire import PointId, RefusedError, bad_form, bad_input

MAX_MESSAGE_BYTES: Final = 64 * 2**20
"""As the real server, unless configured."""
_THREADS: Final = 8
_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_COMPLETED: Final = 2
_ACKNOWLEDGED: Final = 1
Handler = Callable[[QdrantCatalog, Any], dict[str, Any]]
_log = structlog.get_logger(__name__)


def start_grpc_server(catalog: QdrantCatalog, host: str, port: int, api_key: str | None = None) -> grpc.Server:
    """A running server over an opened catalog. Raises RuntimeError if the port is taken."""
    options = (
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
    )
    server = grpc.server(ThreadPoolExecutor(_THREADS, thread_name_prefix="qdrant-grpc"), options=options)
    for service, methods in _SERVICES.items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                _guarded(handler, message_class(answer), catalog, api_key),
                request_deserializer=message_class(request).FromString,
                response_serializer=message_class(answer).SerializeToString,
            )
            for name, (request, answer, handler) in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"{host}:{port}")
    server.start()
    return server


def _guarded(
    handler: Handler, answer: type[Any], catalog: QdrantCatalog, api_key: str | None
) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        if api_key is not None:
            _check_key(context, api_key)
        try:
            return answer(**handler(catalog, request))
        except RateLimitedError as limited:
            if limited.retry_after_seconds is not None:
                context.set_trailing_metadata((("retry-after", str(limited.retry_after_seconds)),))
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, limited.message)
        except RefusedError as refused:
            _abort(context, _CODES.get(refused.status, grpc.StatusCode.INTERNAL), refused.message)
        except Exception as error:  # noqa: BLE001 - gRPC would send the error's text, which may hold a row's content
            _log.error("request failed", error=f"{type(error).__name__}: {wire.first_line(error)}")
            _abort(context, grpc.StatusCode.INTERNAL, f"Service internal error: {type(error).__name__}")

    return call


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("abort raises")


def _check_key(context: grpc.ServicerContext, api_key: str) -> None:
    given = dict(context.invocation_metadata())
    key = str(given.get("api-key") or str(given.get("authorization", "")).removeprefix("Bearer "))
    if not key:
        message = "Must provide an API key or an Authorization bearer token"
        _abort(context, grpc.StatusCode.UNAUTHENTICATED, message)
    if not hmac.compare_digest(key.encode(), api_key.encode()):
        _abort(context, grpc.StatusCode.UNAUTHENTICATED, "Invalid API key or JWT")


def _collection_exists(catalog: QdrantCatalog, request: Any) -> dict[str, Any]:
    return {"result": {"exists": catalog.has(request.collection_name)}}


def _upsert(catalog: QdrantCatalog, request: Any) -> dict[str, Any]:
    if request.HasField("update_filter") or request.update_mode:
        raise bad_input("conditional upserts are not served by this server")
    collection = catalog.get(request.collection_name)
    number = write_points(collection, lambda: [_read_point(point, collection) for point in request.points])
    status = _COMPLETED if request.wait else _ACKNOWLEDGED
    return {"result": {"operation_id": number, "status": status}}


def _get(catalog: QdrantCatalog, request: Any) -> dict[str, Any]:
    ids = [_read_id(each) for each in request.ids]
    selector = _payload_selector(request)
    if request.with_vectors.HasField("include"):
        raise bad_input("this server keeps one unnamed dense vector a point")
    found = read_points(catalog.get(request.collection_name), ids, selector, with_vector=request.with_vectors.enable)
    return {"result": [_retrieved(point) for point in found]}


def _read_id(message: Any) -> PointId:
    return wire.parse_point_id(message.num if message.WhichOneof("point_id_options") == "num" else message.uuid)


def _read_point(message: Any, collection: Collection) -> Any:
    vector = read_vector(message.vectors.vector).tolist()
    if not vector:
        raise bad_input("this server keeps one unnamed dense vector a point")
    point_id = _read_id(message.id)
    try:
        return edge.Point(point_id, wire.parse_vector(vector, collection.settings.size), read_payload(message.payload))
    except (TypeError, ValueError) as error:
        raise bad_form(wire.first_line(error)) from None


def _payload_selector(request: Any) -> Any:
    asked = request.with_payload
    match asked.WhichOneof("selector_options"):
        case "include":
            return edge.PayloadSelector.Include(list(asked.include.fields))
        case "exclude":
            return edge.PayloadSelector.Exclude(list(asked.exclude.fields))
    return asked.enable


def _retrieved(point: Any) -> Any:
    found = _RetrievedPoint(id={"num": point.id} if isinstance(point.id, int) else {"uuid": str(point.id)})
    if point.payload is not None:
        fill_payload(found.payload, point.payload)
    if point.vector is not None:
        found.vectors.vector.data = np.asarray(point.vector, dtype="<f4").tobytes()
    return found


_RetrievedPoint: Final = message_class("RetrievedPoint")


_SERVICES: Final[dict[str, dict[str, tuple[str, str, Handler]]]] = {
    "qdrant.Collections": {
        "CollectionExists": ("CollectionExistsRequest", "CollectionExistsResponse", _collection_exists)
    },
    "qdrant.Points": {
        "Upsert": ("UpsertPoints", "PointsOperationResponse", _upsert),
        "Get": ("GetPoints", "GetResponse", _get),
    },
}
"""By service and method: the messages taken and given, and what answers."""
