"""The calls of Qdrant's REST protocol that are served here: each a plain function of the request. Those for collections.

What is listed neither here nor in `qdrant_point_calls` is a 404; what a listed call cannot do here is refused with a 400
that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import qdrant_edge as edge
import structlog
from qdrant_client.http import models

from embedd_dagster.stack.qdrant import wire
from embedd_dagster.stack.qdrant.collections import Collection, QdrantCatalog
from embedd_dagster.stack.qdrant.optimizer import DEFAULT_INDEXING_THRESHOLD, CollectionSettings
from embedd_dagster.stack.qdrant.wire import RefusedError, bad_input

_IGNORED_SETTINGS = ("hnsw_config", "quantization_config", "wal_config", "sparse_vectors")
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
        """The collection that the path names, also by an alias."""
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
        strict_mode=_strict_mode(asked.strict_mode_config, {}),
    )
    call.catalog.create(call.path["name"], settings)
    return True


def update_collection(call: Call) -> Any:
    """`PATCH /collections/{name}`."""
    asked = wire.parse(models.UpdateCollection, call.body())
    settings = call.collection.settings
    threshold = asked.optimizers_config.indexing_threshold if asked.optimizers_config else None
    call.catalog.configure(
        call.collection.name,
        indexing_threshold=settings.indexing_threshold if threshold is None else threshold,
        strict_mode=_strict_mode(asked.strict_mode_config, settings.strict_mode or {}),
    )
    return True


def _strict_mode(asked: models.StrictModeConfig | None, present: dict[str, Any]) -> dict[str, Any] | None:
    return {**present, **(asked.model_dump(exclude_none=True) if asked else {})} or None


def delete_collection(call: Call) -> Any:
    """`DELETE /collections/{name}`."""
    return call.catalog.delete(call.path["name"])


def collection_exists(call: Call) -> Any:
    """`GET /collections/{name}/exists`."""
    return {"exists": call.catalog.has(call.path["name"])}


def describe_collection(call: Call) -> Any:
    """`GET /collections/{name}`: yellow while an index is being built, or is about to be; red after a build that failed."""
    collection = call.collection
    settings = collection.settings
    error = collection.optimizer_error
    busy = collection.touched is not None or collection.optimizing_due()
    info = collection.read(lambda shard: shard.info())
    vectors: dict[str, Any] = {"size": settings.size, "distance": settings.distance}
    if settings.on_disk is not None:
        vectors["on_disk"] = settings.on_disk
    return {
        "status": "red" if error else "yellow" if busy else "green",
        "optimizer_status": {"error": error} if error else "ok",
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
            "strict_mode_config": settings.strict_mode,
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
    indexed = call.collection.indexed_fields()
    if asked.field_name not in indexed:
        call.collection.strict_mode.check_index(len(indexed))
    return call.updated(call.collection.write(edge.UpdateOperation.create_field_index(asked.field_name, schema)))


def delete_index(call: Call) -> Any:
    """`DELETE /collections/{name}/index/{field_name}`."""
    return call.updated(call.collection.write(edge.UpdateOperation.delete_field_index(call.path["field_name"])))


# -- the table ---------------------------------------------------------------------------------------------------------

COLLECTION_HANDLERS: list[tuple[str, str, Callable[[Call], Any]]] = [
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
]
