"""The texts that a run has embedded already: a duplicate in the table costs one embedding."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from embedd_dagster.core.rows import Vectors

_DEFAULT_BYTES = 32 * 2**20


class TextMemory:
    """Vectors by text hash, the least recently used forgotten beyond `max_bytes`. Safe to use from several threads."""

    def __init__(self, max_bytes: int = _DEFAULT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._vectors: OrderedDict[int, Vectors] = OrderedDict()
        self._lock = threading.Lock()

    def recall(self, hashes: Iterable[int]) -> dict[int, Vectors]:
        """The vectors of those texts that are remembered."""
        found = {}
        with self._lock:
            for hashed in hashes:
                vector = self._vectors.get(hashed)
                if vector is not None:
                    self._vectors.move_to_end(hashed)
                    found[hashed] = vector
        return found

    def remember(self, hashed: int, vector: Vectors) -> None:
        """Keeps the vector of a text, for as long as there is room."""
        with self._lock:
            if hashed in self._vectors:
                return
            # a copy: a row of the answer's array would keep the whole array alive
            self._vectors[hashed] = vector.copy()
            self._bytes += vector.nbytes
            while self._bytes > self._max_bytes:
                _oldest, forgotten = self._vectors.popitem(last=False)
                self._bytes -= forgotten.nbytes
