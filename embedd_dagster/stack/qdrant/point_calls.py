"""The calls for points: writing them, reading them, searching among them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import qdrant_edge as edge
from qdrant_client.http import models

from embedd_dagster.stack.qdrant import wire
from embedd_dagster.stack.qdrant.calls import Call
from embedd_dagster.stack.qdrant.collections import Collection
from embedd_dagster.stack.qdrant.wire import RefusedError, bad_form, bad_input

_POINTS = "/collections/{name}/points"
# Reading and writing points holds Python's global lock nearly all the time: two at once take twice the CPU together (7,700
# points a second from three writers, 14,200 one after the other).
_ONE_AT_A_TIME = threading.Lock()


# -- writing points ----------------------------------------------------------------------------------------------------


def write_points(collection: Collection, read: Callable[[], list[Any]]) -> int:
    """The number of the write of the points that `read` makes, one write at a time."""
    with _ONE_AT_A_TIME:
        return _write_points(collection, read())


def _write_points(collection: Collection, points: list[Any]) -> int:
    collection.strict_mode.check_upsert(len(points))
    return collection.write(
        edge.UpdateOperation.upsert_points(points), ids=(wire.parse_point_id(point.id) for point in points)
    )


def _upsert(collection: Collection, body: dict[str, Any]) -> int:
    return _write_points(collection, wire.parse_points(body, collection.settings.size))


def _targets(body: dict[str, Any]) -> tuple[list[wire.PointId] | None, Any]:
    """The points that a write names: by ids, or by a filter."""
    if isinstance(body.get("points"), list):
        return wire.parse_point_ids(body["points"]), None
    if isinstance(body.get("filter"), dict):
        asked = wire.parse(models.FilterSelector, {"filter": body["filter"]})
        return None, wire.render_filter(asked.filter)
    raise bad_form("data did not match any variant of untagged enum PointsSelector")


def _delete(collection: Collection, body: dict[str, Any]) -> int:
    ids, where = _targets(body)
    collection.strict_mode.check_write(len(ids or ()))
    operations = edge.UpdateOperation
    operation = operations.delete_points_by_filter(where) if ids is None else operations.delete_points([*ids])
    return collection.write(operation, ids=ids or (), where=where, deletes=True)


def _payload_write(kind: str) -> Callable[[Collection, dict[str, Any]], int]:
    def write(collection: Collection, body: dict[str, Any]) -> int:
        ids, where = _targets(body)
        collection.strict_mode.check_write(len(ids or ()))
        by_ids: Any = getattr(edge.UpdateOperation, kind)
        by_filter: Any = getattr(edge.UpdateOperation, f"{kind}_by_filter")
        arguments: list[Any] = []
        if kind in {"set_payload", "overwrite_payload"}:
            if not isinstance(body.get("payload"), dict):
                raise bad_form("missing field `payload`")
            arguments = [body["payload"], body.get("key")]
        elif kind == "delete_payload":
            if not isinstance(body.get("keys"), list):
                raise bad_form("missing field `keys`")
            arguments = [body["keys"]]
        try:
            operation = by_filter(where, *arguments) if ids is None else by_ids(ids, *arguments)
        except (TypeError, ValueError, OverflowError) as error:
            raise bad_form(wire.first_line(error)) from None
        return collection.write(operation, ids=ids or (), where=where)

    return write


_WRITES: dict[str, Callable[[Collection, dict[str, Any]], int]] = {
    "upsert": _upsert,
    "delete": _delete,
    "set_payload": _payload_write("set_payload"),
    "overwrite_payload": _payload_write("overwrite_payload"),
    "delete_payload": _payload_write("delete_payload"),
    "clear_payload": _payload_write("clear_payload"),
}


def _writing(kind: str) -> Callable[[Call], Any]:
    def handler(call: Call) -> Any:
        with _ONE_AT_A_TIME:
            return call.updated(_WRITES[kind](call.collection, call.body()))

    return handler


def write_batch(call: Call) -> Any:
    """`POST …/points/batch`: the operations one after the other; one that is refused ends it."""
    with _ONE_AT_A_TIME:
        return _write_batch(call)


def _write_batch(call: Call) -> list[dict[str, Any]]:
    operations = call.body().get("operations")
    if not isinstance(operations, list):
        raise bad_form("missing field `operations`")
    collection = call.collection
    for operation in operations:
        if not isinstance(operation, dict) or len(operation) != 1 or not operation.keys() <= _WRITES.keys():
            raise bad_form("data did not match any variant of untagged enum UpdateOperation")
    return [
        call.updated(_WRITES[kind](collection, body)) for operation in operations for kind, body in operation.items()
    ]


# -- reading points ----------------------------------------------------------------------------------------------------


def retrieve_points(call: Call) -> Any:
    """`POST …/points`."""
    asked = wire.parse(models.PointRequest, call.body())
    ids = wire.parse_point_ids(asked.ids)
    selector = wire.render_payload_selector(asked.with_payload, default=True)
    found = read_points(call.collection, ids, selector, with_vector=asked.with_vector or False)
    return [wire.describe_point(point) for point in found]


def read_points(collection: Collection, ids: list[wire.PointId], selector: Any, *, with_vector: Any) -> list[Any]:
    """The points of these ids, as Edge gives them."""
    collection.strict_mode.check_ids_read(len(ids))
    found: list[Any] = collection.read(lambda shard: shard.retrieve(ids, selector, with_vector))
    return found


def get_point(call: Call) -> Any:
    """`GET …/points/{id}`."""
    written = call.path["id"]
    point_id = wire.parse_point_id(int(written) if written.isdecimal() else written)
    found = call.collection.read(lambda shard: shard.retrieve([point_id], True, True))
    if not found:
        raise RefusedError(404, f"Not found: Point with id {point_id} does not exists!")
    return wire.describe_point(found[0])


def scroll_points(call: Call) -> Any:
    """`POST …/points/scroll`, in the order of ids."""
    body = call.body()
    asked = wire.parse(models.ScrollRequest, body)
    call.collection.strict_mode.check_read(body, call.collection.indexed_fields, limit=asked.limit)
    if asked.order_by is not None:
        raise bad_input("order_by is not served by this server")
    request = edge.ScrollRequest(
        offset=None if asked.offset is None else wire.parse_point_id(asked.offset),
        limit=_at_least_one(asked.limit, 10),
        filter=wire.render_filter(asked.filter),
        with_payload=wire.render_payload_selector(asked.with_payload, default=True),
        with_vector=asked.with_vector or False,
    )
    points, following = call.collection.read(lambda shard: shard.scroll(request))
    return {"points": [wire.describe_point(point) for point in points], "next_page_offset": following}


def count_points(call: Call) -> Any:
    """`POST …/points/count`; always exact."""
    body = call.body()
    asked = wire.parse(models.CountRequest, body)
    # exact unless told otherwise, as the real server is
    call.collection.strict_mode.check_read({"exact": True, **body}, call.collection.indexed_fields)
    request = edge.CountRequest(exact=True, filter=wire.render_filter(asked.filter))
    return {"count": call.collection.read(lambda shard: shard.count(request))}


def query_points(call: Call) -> Any:
    """`POST …/points/query`."""
    return {"points": _query(call.collection, call.body())}


def query_points_batch(call: Call) -> Any:
    """`POST …/points/query/batch`."""
    searches = call.body().get("searches")
    if not isinstance(searches, list):
        raise bad_form("missing field `searches`")
    return [{"points": _query(call.collection, search)} for search in searches]


def search_points(call: Call) -> Any:
    """`POST …/points/search`, the older form of a query by vector."""
    body = call.body()
    if "vector" not in body:
        raise bad_form("missing field `vector`")
    return _query(call.collection, {**body, "query": body["vector"], "vector": None})


def _query(collection: Collection, body: Any) -> list[dict[str, Any]]:
    if not isinstance(body, dict):
        raise bad_form("invalid type: expected a query")
    # The vector is taken out first: to check it against a union of a dozen kinds of query costs more than the search.
    rest = {key: value for key, value in body.items() if key not in {"query", "vector"}}
    asked = wire.parse(models.QueryRequest, rest)
    collection.strict_mode.check_read(rest, collection.indexed_fields, limit=asked.limit)
    vector = body.get("query")
    if isinstance(vector, dict) and vector.keys() == {"nearest"}:
        vector = vector["nearest"]
    if asked.prefetch is not None or asked.lookup_from is not None or asked.using:
        raise bad_input("prefetch, lookup_from and named vectors are not served by this server")
    params = asked.params or models.SearchParams()
    try:
        request = edge.QueryRequest(
            limit=_at_least_one(asked.limit, 10),
            offset=asked.offset or 0,
            query=None if vector is None else edge.Query.Nearest(wire.parse_vector(vector, collection.settings.size)),
            filter=wire.render_filter(asked.filter),
            score_threshold=asked.score_threshold,
            with_payload=wire.render_payload_selector(asked.with_payload, default=False),
            with_vector=asked.with_vector or False,
            params=edge.SearchParams(
                hnsw_ef=params.hnsw_ef,
                exact=params.exact or False,
                indexed_only=params.indexed_only or False,
                acorn=_acorn(params.acorn),
            ),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise bad_form(wire.first_line(error)) from None
    return [wire.describe_point(point) for point in collection.read(lambda shard: shard.query(request))]


def _acorn(asked: models.AcornSearchParams | None) -> Any:
    return None if asked is None else edge.AcornSearchParams(asked.enable or False, asked.max_selectivity)


def _at_least_one(limit: int | None, default: int) -> int:
    if limit is None:
        return default
    if limit < 1:
        raise RefusedError(422, f"Validation error in JSON body: [limit: value {limit} invalid, must be 1 or larger]")
    return limit


# -- the table ---------------------------------------------------------------------------------------------------------

POINT_HANDLERS: list[tuple[str, str, Callable[[Call], Any]]] = [
    ("PUT", _POINTS, _writing("upsert")),
    ("POST", _POINTS, retrieve_points),
    ("POST", f"{_POINTS}/delete", _writing("delete")),
    ("POST", f"{_POINTS}/payload", _writing("set_payload")),
    ("PUT", f"{_POINTS}/payload", _writing("overwrite_payload")),
    ("POST", f"{_POINTS}/payload/delete", _writing("delete_payload")),
    ("POST", f"{_POINTS}/payload/clear", _writing("clear_payload")),
    ("POST", f"{_POINTS}/batch", write_batch),
    ("POST", f"{_POINTS}/scroll", scroll_points),
    ("POST", f"{_POINTS}/count", count_points),
    ("POST", f"{_POINTS}/query", query_points),
    ("POST", f"{_POINTS}/query/batch", query_points_batch),
    ("POST", f"{_POINTS}/search", search_points),
    ("GET", f"{_POINTS}/{{id}}", get_point),
]
