"""The calls of Qdrant's REST protocol that are served here: each a plain function of the request.

What is not listed in `HANDLERS` is a 404; what a listed call cannot do here is refused with a 400 that says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import qdrant_edge as edge
import structlog
from qdrant_client.http import models

from embedd_dagster.local import qdrant_wire as wire
from embedd_dagster.local.qdrant_collections import Collection, QdrantCatalog
from embedd_dagster.local.qdrant_optimizer import DEFAULT_INDEXING_THRESHOLD, CollectionSettings
from embedd_dagster.local.qdrant_wire import RefusedError, bad_form, bad_input

_POINTS = "/collections/{name}/points"
_IGNORED_SETTINGS = ("hnsw_config", "quantization_config", "wal_config", "sparse_vectors", "strict_mode_config")
# Reading and writing points holds Python's global lock nearly all the time: two at once take twice the CPU together (7,700
# points a second from three writers, 14,200 one after the other).
_ONE_AT_A_TIME = threading.Lock()

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Call:
    """A request, read: the handlers are plain functions of it, run in threads."""

    catalog: QdrantCatalog
    path: dict[str, str]
    wait: bool
    raw_body: bytes

    @property
    def collection(self) -> Collection:
        """The collection that the path names, be it by an alias."""
        return self.catalog.get(self.path["name"])

    def body(self) -> dict[str, Any]:
        """The JSON object sent."""
        return wire.parse_json(self.raw_body)

    def updated(self, operation_id: int) -> dict[str, Any]:
        """The answer to a write."""
        return {"operation_id": operation_id, "status": "completed" if self.wait else "acknowledged"}


# -- collections -------------------------------------------------------------------------------------------------------


def list_collections(call: Call) -> Any:
    """`GET /collections`."""
    return {"collections": [{"name": name} for name in call.catalog.names()]}


def create_collection(call: Call) -> Any:
    """`PUT /collections/{name}`."""
    asked = wire.parse(models.CreateCollection, call.body())
    vectors = asked.vectors
    if not isinstance(vectors, models.VectorParams) or vectors.multivector_config is not None:
        raise bad_input("this server keeps one unnamed dense vector a point")
    if not 1 <= vectors.size <= 65_536:
        raise RefusedError(
            422, f"Validation error in JSON body: [vectors.size: value {vectors.size} invalid, must be from 1 to 65536]"
        )
    ignored = [name for name in _IGNORED_SETTINGS if getattr(asked, name) is not None]
    if ignored:
        _log.info("settings without effect here", collection=call.path["name"], settings=ignored)
    threshold = asked.optimizers_config.indexing_threshold if asked.optimizers_config else None
    settings = CollectionSettings(
        size=vectors.size,
        distance=vectors.distance.value,
        on_disk=vectors.on_disk,
        indexing_threshold=DEFAULT_INDEXING_THRESHOLD if threshold is None else threshold,
    )
    call.catalog.create(call.path["name"], settings)
    return True


def update_collection(call: Call) -> Any:
    """`PATCH /collections/{name}`."""
    asked = wire.parse(models.UpdateCollection, call.body())
    name = call.collection.name
    if asked.optimizers_config and asked.optimizers_config.indexing_threshold is not None:
        call.catalog.set_indexing_threshold(name, asked.optimizers_config.indexing_threshold)
    return True


def delete_collection(call: Call) -> Any:
    """`DELETE /collections/{name}`."""
    return call.catalog.delete(call.path["name"])


def collection_exists(call: Call) -> Any:
    """`GET /collections/{name}/exists`."""
    return {"exists": call.catalog.has(call.path["name"])}


def describe_collection(call: Call) -> Any:
    """`GET /collections/{name}`: yellow while an index is being built, or is about to be."""
    collection = call.collection
    settings = collection.settings
    busy = collection.touched is not None or collection.optimizing_due()
    info = collection.read(lambda shard: shard.info())
    vectors: dict[str, Any] = {"size": settings.size, "distance": settings.distance}
    if settings.on_disk is not None:
        vectors["on_disk"] = settings.on_disk
    return {
        "status": "yellow" if busy else "green",
        "optimizer_status": "ok",
        "vectors_count": info.points_count,
        "indexed_vectors_count": info.indexed_vectors_count,
        "points_count": info.points_count,
        "segments_count": info.segments_count,
        "config": {
            "params": {
                "vectors": vectors,
                "shard_number": 1,
                "replication_factor": 1,
                "write_consistency_factor": 1,
                "on_disk_payload": True,
            },
            "hnsw_config": {
                "m": 16,
                "ef_construct": 100,
                "full_scan_threshold": 10_000,
                "max_indexing_threads": 0,
                "on_disk": False,
            },
            "optimizer_config": {
                "deleted_threshold": 0.2,
                "vacuum_min_vector_number": 1_000,
                "default_segment_number": 0,
                "max_segment_size": None,
                "memmap_threshold": None,
                "indexing_threshold": settings.indexing_threshold,
                "flush_interval_sec": 5,
                "max_optimization_threads": None,
            },
            "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
            "quantization_config": None,
        },
        "payload_schema": {field: wire.describe_index(index) for field, index in sorted(info.payload_schema.items())},
    }


# -- aliases -----------------------------------------------------------------------------------------------------------


def list_aliases(call: Call) -> Any:
    """`GET /aliases`."""
    return {"aliases": call.catalog.aliases()}


def list_collection_aliases(call: Call) -> Any:
    """`GET /collections/{name}/aliases`."""
    return {"aliases": call.catalog.aliases(call.collection.name)}


def change_aliases(call: Call) -> Any:
    """`POST /collections/aliases`: all of the actions, or none."""
    asked = wire.parse(models.ChangeAliasesOperation, call.body())
    call.catalog.change_aliases(_alias_change(call.catalog, action) for action in asked.actions)
    return True


def _alias_change(catalog: QdrantCatalog, action: models.AliasOperations) -> Callable[[dict[str, str]], None]:
    def change(aliases: dict[str, str]) -> None:
        match action:
            case models.CreateAliasOperation(create_alias=new):
                catalog.create_alias(aliases, new.alias_name, new.collection_name)
            case models.DeleteAliasOperation(delete_alias=old):
                aliases.pop(old.alias_name, None)
            case models.RenameAliasOperation(rename_alias=names):
                if names.old_alias_name not in aliases:
                    raise RefusedError(404, f"Not found: Alias {names.old_alias_name} does not exists!")
                catalog.create_alias(aliases, names.new_alias_name, aliases.pop(names.old_alias_name))

    return change


# -- payload indexes ---------------------------------------------------------------------------------------------------


def create_index(call: Call) -> Any:
    """`PUT /collections/{name}/index`."""
    asked = wire.parse(models.CreateFieldIndex, call.body())
    schema = wire.render_index_schema(asked.field_schema)
    return call.updated(call.collection.write(edge.UpdateOperation.create_field_index(asked.field_name, schema)))


def delete_index(call: Call) -> Any:
    """`DELETE /collections/{name}/index/{field_name}`."""
    return call.updated(call.collection.write(edge.UpdateOperation.delete_field_index(call.path["field_name"])))


# -- writing points ----------------------------------------------------------------------------------------------------


def _upsert(collection: Collection, body: dict[str, Any]) -> int:
    points = wire.parse_points(body, collection.settings.size)
    return collection.write(
        edge.UpdateOperation.upsert_points(points), ids=(wire.parse_point_id(point.id) for point in points)
    )


def _targets(body: dict[str, Any]) -> tuple[list[wire.PointId] | None, Any]:
    """The points that a write names: by ids, or by a filter."""
    if isinstance(body.get("points"), list):
        return wire.parse_point_ids(body["points"]), None
    if isinstance(body.get("filter"), dict):
        return None, wire.render_filter(wire.parse(models.Filter, body["filter"]))
    raise bad_form("data did not match any variant of untagged enum PointsSelector")


def _delete(collection: Collection, body: dict[str, Any]) -> int:
    ids, where = _targets(body)
    operations = edge.UpdateOperation
    operation = operations.delete_points_by_filter(where) if ids is None else operations.delete_points([*ids])
    return collection.write(operation, ids=ids or (), where=where, deletes=True)


def _payload_write(kind: str) -> Callable[[Collection, dict[str, Any]], int]:
    def write(collection: Collection, body: dict[str, Any]) -> int:
        ids, where = _targets(body)
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
    found = call.collection.read(lambda shard: shard.retrieve(ids, selector, asked.with_vector or False))
    return [wire.describe_point(point) for point in found]


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
    asked = wire.parse(models.ScrollRequest, call.body())
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
    asked = wire.parse(models.CountRequest, call.body())
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

HANDLERS: list[tuple[str, str, Callable[[Call], Any]]] = [
    ("GET", "/collections", list_collections),
    ("GET", "/aliases", list_aliases),
    ("POST", "/collections/aliases", change_aliases),
    ("PUT", "/collections/{name}", create_collection),
    ("GET", "/collections/{name}", describe_collection),
    ("PATCH", "/collections/{name}", update_collection),
    ("DELETE", "/collections/{name}", delete_collection),
    ("GET", "/collections/{name}/exists", collection_exists),
    ("GET", "/collections/{name}/aliases", list_collection_aliases),
    ("PUT", "/collections/{name}/index", create_index),
    ("DELETE", "/collections/{name}/index/{field_name:path}", delete_index),
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
