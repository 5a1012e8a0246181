"""Builds a collection's HNSW index aside, in a process of its own, while the collection goes on serving.

`EdgeShard.optimize()` holds Python's global lock until it is done, half a minute for a hundred thousand points: a thread
would not help. So a copy of the shard is optimized by a child process, the points written meanwhile are carried over, and the
collection switches to the copy. A crash at any moment leaves the old shard in charge, with every write in its log.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import qdrant_edge as edge
import structlog

if TYPE_CHECKING:
    from embedd_dagster.stack.qdrant.collections import Collection

_log = structlog.get_logger(__name__)

DEFAULT_INDEXING_THRESHOLD = 10_000  # kilobytes of vectors; 0 switches indexing off
_CARRY_CHUNK = 1_000
_CARRY_ROUNDS = 500
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class CollectionSettings:
    """What a collection was created with, as far as this server heeds it."""

    size: int
    distance: str
    on_disk: bool | None = None
    indexing_threshold: int = DEFAULT_INDEXING_THRESHOLD
    strict_mode: dict[str, Any] | None = None


def optimize(collection: Collection) -> bool:
    """True once the collection serves from an optimized shard; false where it was dropped or stopped meanwhile."""
    aside = collection.path.with_name(uuid.uuid4().hex)
    try:
        collection.copy_shard(aside)
        if not _run_child(collection, aside):
            return False
        shard = edge.EdgeShard.load(str(aside))
        info = shard.info()
        _carry_over(collection, shard)
        with collection.write_lock:
            while collection.touched:
                _carry_chunk(collection, shard)
            _carry_indexes(collection, shard)
            shard.flush()
            return collection.switch(shard, aside, settled=info.points_count - info.indexed_vectors_count)
    finally:
        with collection.write_lock:
            collection.touched = None
        if collection.path != aside:
            shutil.rmtree(aside, ignore_errors=True)


def _run_child(collection: Collection, aside: Path) -> bool:
    settings = orjson.dumps(asdict(collection.settings)).decode()
    command = [sys.executable, "-m", __name__, str(aside), settings]
    with subprocess.Popen(command) as child:
        while True:
            try:
                code = child.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if not collection.stopped:
                    continue
                child.kill()
                return False
            if code != 0:
                _log.warning("index build failed", collection=collection.name, exit_code=code)
                collection.pause_optimizing(f"the process that builds the index ended with exit code {code}")
            return code == 0


def _carry_over(collection: Collection, shard: Any) -> None:
    # In small bites, so that writers get their turn; a writer that outruns this is ended by the caller, under the lock.
    for _ in range(_CARRY_ROUNDS):
        with collection.write_lock:
            if collection.stopped or not collection.touched:
                return
            _carry_chunk(collection, shard)


def _carry_chunk(collection: Collection, shard: Any) -> None:
    touched = collection.touched or set()
    ids = [touched.pop() for _ in range(min(len(touched), _CARRY_CHUNK))]
    present = collection.shard.retrieve(ids, True, True)
    gone = set(ids) - {point.id for point in present}
    if present:
        points = [edge.Point(point.id, point.vector, point.payload) for point in present]
        shard.update(edge.UpdateOperation.upsert_points(points))
    if gone:
        shard.update(edge.UpdateOperation.delete_points(list(gone)))


def _carry_indexes(collection: Collection, shard: Any) -> None:
    wanted, there = collection.shard.info().payload_schema, shard.info().payload_schema
    for field in there.keys() - wanted.keys():
        shard.update(edge.UpdateOperation.delete_field_index(field))
    for field, info in wanted.items():
        if field not in there or repr(there[field].params) != repr(info.params):
            schema = info.params if info.params is not None else info.data_type
            shard.update(edge.UpdateOperation.create_field_index(field, schema))


def shard_config(settings: CollectionSettings) -> Any:
    """What Edge is told of a collection."""
    return edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(
            size=settings.size, distance=getattr(edge.Distance, settings.distance), on_disk=settings.on_disk
        ),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=settings.indexing_threshold),
    )


def _optimize_shard(path: str, settings: CollectionSettings) -> None:
    if sys.platform == "linux":
        # Nobody waits for this work once the server is gone.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
    shard = edge.EdgeShard.load(path, shard_config(settings))
    shard.optimize()
    shard.flush()
    shard.close()


if __name__ == "__main__":
    _optimize_shard(sys.argv[1], CollectionSettings(**orjson.loads(sys.argv[2])))
