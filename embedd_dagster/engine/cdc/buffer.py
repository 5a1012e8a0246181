"""Changed keys that cannot be applied yet, because a task works on their vector table."""

from __future__ import annotations

from collections.abc import Iterable

from embedd_dagster.core.keys import Key, encode_key


class ChangeBuffer:
    """Keys by vector table, each once. A table with too many keys overflows: it needs a resync instead."""

    def __init__(self, max_keys_per_table: int = 100_000) -> None:
        self._max_keys = max_keys_per_table
        self._keys: dict[str, dict[str, Key]] = {}
        self._overflowed: set[str] = set()

    def add(self, vector_table_id: str, keys: Iterable[Key]) -> bool:
        """Buffers keys; False if the table has overflowed."""
        if vector_table_id in self._overflowed:
            return False
        buffered = self._keys.setdefault(vector_table_id, {})
        buffered.update((encode_key(key), key) for key in keys)
        if len(buffered) > self._max_keys:
            del self._keys[vector_table_id]
            self._overflowed.add(vector_table_id)
            return False
        return True

    def tables(self) -> list[str]:
        """The vector tables with buffered keys, and those that have overflowed."""
        return [*self._keys, *self._overflowed]

    def count(self, vector_table_id: str) -> int:
        """How many keys are buffered."""
        return len(self._keys.get(vector_table_id, ()))

    def take(self, vector_table_id: str) -> list[Key] | None:
        """Removes and returns the table's keys; None if it had overflowed."""
        if vector_table_id in self._overflowed:
            self._overflowed.discard(vector_table_id)
            return None
        return list(self._keys.pop(vector_table_id, {}).values())

    def put_back(self, vector_table_id: str, keys: Iterable[Key] | None) -> None:
        """Undoes a `take` whose keys could not be applied; keys buffered since then are kept."""
        if keys is None:
            self._keys.pop(vector_table_id, None)
            self._overflowed.add(vector_table_id)
        else:
            self.add(vector_table_id, keys)
