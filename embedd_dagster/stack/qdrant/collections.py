"""Collections and aliases on disk, over shards of Qdrant Edge, which knows neither.

One small file, `catalog.json`, says which collections and aliases there are and which directory each collection's shard is
in. It is replaced whole, so an alias switch, a deletion or the switch to an optimized shard has happened or has not; a
directory that it does not name is left over from a crash and goes at the next start.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import qdrant_edge as edge
import structlog

from embedd_dagster.stack.files import OwnerLock
from embedd_dagster.stack.qdrant.optimizer import CollectionSettings, optimize, shard_config
from embedd_dagster.stack.qdrant.strict_mode import StrictMode
from embedd_dagster.stack.qdrant.wire import PointId, RefusedError, bad_input, first_line

Result = TypeVar("Result")

_log = structlog.get_logger(__name__)

_MAX_NAME_LENGTH = 255
_FORBIDDEN_IN_NAMES = frozenset('<>:"/\\|?*\0\x1f')
_FLUSH_SECONDS = 5.0
_OPTIMIZE_SECONDS = 0.5
_VACUUM_SHARE = 0.2
_VACUUM_MINIMUM = 1_000
_SCROLL_PAGE = 10_000


class Collection:
    """One collection's shard, and what to know in order to optimize it aside.

    Edge runs every call under Python's global lock, so calls never overlap and readers take no lock; `write_lock` keeps the
    record of touched points in step with the writes.
    """

    def __init__(self, name: str, path: Path, settings: CollectionSettings, shard: Any, catalog: QdrantCatalog) -> None:
        self.name = name
        self.path = path
        self.settings = settings
        self.shard = shard
        self.write_lock = threading.RLock()
        self.touched: set[PointId] | None = None  # the points written since the copy, while one is optimized
        self.stopped = False
        self.flush_due = False
        self.strict_mode = StrictMode()
        self.optimizer_error: str | None = None
        self.apply(settings)
        self._catalog = catalog
        self._settled = 0  # points that the last optimization left without index: further tries would too
        self._deleted = 0
        self._operation_id = 0

    def apply(self, settings: CollectionSettings) -> None:
        """Takes new settings; an error of the optimizer is forgotten, as it tries again."""
        self.settings = settings
        self.strict_mode.config = settings.strict_mode or {}
        self.optimizer_error = None

    def indexed_fields(self) -> set[str]:
        """The fields that have a payload index."""
        return set(self.read(lambda shard: shard.info()).payload_schema)

    def read(self, call: Callable[[Any], Result]) -> Result:
        """What `call` makes of the shard."""
        while True:
            shard = self.shard
            try:
                return call(shard)
            except Exception as error:  # noqa: BLE001 - Edge raises nothing more special
                if self.stopped:
                    raise collection_not_found(self.name) from None
                if self.shard is shard:
                    raise _refusal(error) from None

    def write(
        self, operation: Any, *, ids: Iterable[PointId] = (), where: Any | None = None, deletes: bool = False
    ) -> int:
        """The number of the operation, which is in the shard's log now.

        Args:
            operation: What Edge is to do.
            ids: The points that it touches.
            where: The filter of the points that it touches, where they are not known by id.
            deletes: Whether the touched points go.
        """
        with self.write_lock:
            if self.stopped:
                raise collection_not_found(self.name)
            before = self.read(lambda shard: shard.info().points_count) if deletes else 0
            if self.touched is not None:
                self.touched.update(ids)
                if where is not None:
                    self.touched.update(self._matching(where))
            self.flush_due = True
            self.read(lambda shard: shard.update(operation))
            if deletes:
                self._deleted += before - self.read(lambda shard: shard.info().points_count)
            self._operation_id += 1
            return self._operation_id

    def optimizing_due(self) -> bool:
        """Whether the shard wants an index that it does not have, or holds too many deleted points."""
        threshold = self.settings.indexing_threshold
        if threshold <= 0 or self.stopped:
            return False
        info = self.read(lambda shard: shard.info())
        unindexed = max(0, info.points_count - info.indexed_vectors_count - self._settled)
        kilobytes = unindexed * self.settings.size * 4 / 1024
        crowded = self._deleted >= max(_VACUUM_MINIMUM, _VACUUM_SHARE * info.points_count)
        return bool(kilobytes >= threshold or crowded)

    def pause_optimizing(self, error: str) -> None:
        """After a failure: not again before as many points as make it due have come on top, or settings are changed."""
        self.optimizer_error = error
        info = self.read(lambda shard: shard.info())
        self._settled, self._deleted = info.points_count - info.indexed_vectors_count, 0

    def try_again(self) -> None:
        """Lets the optimizer look at what an earlier try left without index."""
        self._settled = 0

    def copy_shard(self, target: Path) -> None:
        """Copies the shard to `target` and begins the record of touched points."""
        with self.write_lock:
            self.read(lambda shard: shard.flush())
            shutil.copytree(self.path, target)
            self.touched = set()

    def switch(self, shard: Any, path: Path, *, settled: int) -> bool:
        """True once the collection serves from `shard`, durably; call it under `write_lock`."""
        if self.stopped:
            shard.close()
            return False
        old_shard, old_path = self.shard, self.path
        self.shard, self.path = shard, path
        try:
            self._catalog.save()
        except BaseException:
            self.shard, self.path = old_shard, old_path
            shard.close()
            raise
        self._settled, self._deleted = settled, 0
        old_shard.close()
        shutil.rmtree(old_path, ignore_errors=True)
        return True

    def flush(self) -> None:
        """Writes the shard's segments to disk, which shortens its log."""
        with self.write_lock:
            if self.flush_due and not self.stopped:
                self.flush_due = False
                self.read(lambda shard: shard.flush())

    def close(self) -> None:
        """Flushes and closes; everybody who comes later is told that the collection is not there."""
        with self.write_lock:
            if not self.stopped:
                self.stopped = True
                self.shard.flush()
                self.shard.close()

    def _matching(self, where: Any) -> list[PointId]:
        found: list[PointId] = []
        offset = None
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=_SCROLL_PAGE, filter=where, with_payload=False, with_vector=False
            )
            page, offset = self.shard.scroll(request)
            found += [point.id for point in page]
            if offset is None:
                return found


class QdrantCatalog:
    """The collections and aliases of one data directory, which it owns until `close`."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._shards = data / "collections"
        self._file = data / "catalog.json"
        self._lock = threading.RLock()
        self._owner_lock = OwnerLock(data / ".lock")
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._collections: dict[str, Collection] = {}
        self._aliases: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._keep_flushed, name="qdrant-flush", daemon=True),
            threading.Thread(target=self._keep_optimized, name="qdrant-optimize", daemon=True),
        ]

    def open(self) -> None:
        """Opens every collection, replaying what its log holds.

        Raises:
            RuntimeError: Another server has the directory.
        """
        self._shards.mkdir(parents=True, exist_ok=True)
        if not self._owner_lock.acquire():
            raise RuntimeError(f"another server is using {self._data}")
        saved = orjson.loads(self._file.read_bytes()) if self._file.exists() else {}
        for name, entry in saved.get("collections", {}).items():
            path = self._shards / entry["shard"]
            shard = edge.EdgeShard.load(str(path))
            settings = CollectionSettings(**entry["settings"])
            self._collections[name] = Collection(name, path, settings, shard, self)
        self._aliases = saved.get("aliases", {})
        named = {collection.path for collection in self._collections.values()}
        for path in self._shards.iterdir():
            if path not in named:
                shutil.rmtree(path, ignore_errors=True)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops the background work, flushes and closes every collection."""
        self._closing.set()
        self._wake.set()
        for collection in list(self._collections.values()):
            collection.close()
        for thread in self._threads:
            thread.join()

    def names(self) -> list[str]:
        """The names of all collections."""
        return sorted(self._collections)

    def aliases(self, collection_name: str | None = None) -> list[dict[str, str]]:
        """All aliases, or those of one collection, as Qdrant describes them."""
        return [
            {"alias_name": alias, "collection_name": name}
            for alias, name in sorted(self._aliases.items())
            if collection_name in (None, name)
        ]

    def get(self, name: str) -> Collection:
        """The collection of that name or alias."""
        with self._lock:
            collection = self._collections.get(self._aliases.get(name, name))
        if collection is None:
            raise collection_not_found(name)
        return collection

    def has(self, name: str) -> bool:
        """Whether there is a collection of that name or alias."""
        with self._lock:
            return self._aliases.get(name, name) in self._collections

    def create(self, name: str, settings: CollectionSettings) -> None:
        """Creates an empty collection."""
        if not name or len(name) > _MAX_NAME_LENGTH or _FORBIDDEN_IN_NAMES & set(name):
            raise RefusedError(422, f"Validation error in path parameters: collection name `{name}` is invalid")
        with self._lock:
            if name in self._collections:
                raise RefusedError(409, f"Wrong input: Collection `{name}` already exists!")
            if name in self._aliases:
                raise bad_input(f"Can't create collection with name {name}. Alias with the same name already exists")
            path = self._shards / uuid.uuid4().hex
            path.mkdir()
            shard = edge.EdgeShard.create(str(path), shard_config(settings))
            self._collections[name] = Collection(name, path, settings, shard, self)
            self.save()

    def delete(self, name: str) -> bool:
        """False where there is no collection of that name; its aliases go with it."""
        with self._lock:
            collection = self._collections.pop(name, None)
            if collection is None:
                return False
            self._aliases = {alias: to for alias, to in self._aliases.items() if to != name}
            self.save()
        collection.close()
        shutil.rmtree(collection.path, ignore_errors=True)
        return True

    def configure(self, name: str, **changes: Any) -> None:
        """Changes settings of a collection; an index that they make due is built at once."""
        with self._lock:
            collection = self.get(name)
            collection.apply(replace(collection.settings, **changes))
            collection.try_again()
            self.save()
        self._wake.set()

    def change_aliases(self, changes: Iterable[Callable[[dict[str, str]], None]]) -> None:
        """Applies all of the changes or, where one raises, none."""
        with self._lock:
            changed = dict(self._aliases)
            for change in changes:
                change(changed)
            before, self._aliases = self._aliases, changed
            try:
                self.save()
            except BaseException:
                self._aliases = before
                raise

    def create_alias(self, aliases: dict[str, str], alias: str, name: str) -> None:
        """Points `alias` at a collection, away from the one that it may have had."""
        if name not in self._collections:
            raise collection_not_found(name)
        if alias in self._collections:
            raise RefusedError(409, f"Wrong input: Collection `{alias}` already exists!")
        aliases[alias] = name

    def save(self) -> None:
        """Makes the present collections and aliases those of the next start."""
        with self._lock:
            content = {
                "collections": {
                    name: {"shard": collection.path.name, "settings": asdict(collection.settings)}
                    for name, collection in self._collections.items()
                },
                "aliases": self._aliases,
            }
            temporary = self._file.with_suffix(".tmp")
            with temporary.open("wb") as file:
                file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._file)
            directory = os.open(self._data, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _keep_flushed(self) -> None:
        while not self._closing.wait(_FLUSH_SECONDS):
            for collection in list(self._collections.values()):
                self._try("flush", collection, collection.flush)

    def _keep_optimized(self) -> None:
        while not self._closing.is_set():
            for collection in list(self._collections.values()):
                self._try("optimize", collection, partial(_optimize_if_due, collection))
            self._wake.wait(_OPTIMIZE_SECONDS)
            self._wake.clear()

    def _try(self, what: str, collection: Collection, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - background work goes on with the next collection
            if not collection.stopped:
                _log.warning("background work failed", what=what, collection=collection.name, error=str(error))
                if what == "optimize":
                    collection.pause_optimizing(str(error))


def collection_not_found(name: str) -> RefusedError:
    """The refusal of a name that no collection or alias has."""
    return RefusedError(404, f"Not found: Collection `{name}` doesn't exist!")


def _optimize_if_due(collection: Collection) -> None:
    if collection.optimizing_due():
        optimize(collection)


def _refusal(error: Exception) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    message = first_line(error)
    if message.startswith("Service runtime error"):
        return RefusedError(500, message)
    if message.startswith("No point with id"):
        return RefusedError(404, f"Not found: {message} found")
    return bad_input(message)
