"""Changed keys that cannot be applied yet, because a task is at work on their vector table."""

from __future__ import annotations

from collections.abc import Iterable

from embedd_dagster.core.keys import Key, encode_key


class NotedKeys:
    """Keys by vector table, each once; a table that has too many is given up, and owed a sync instead."""

    def __init__(self, max_keys_a_table: int = 100_000) -> None:
        self._max_keys = max_keys_a_table
        self._keys: dict[str, dict[str, Key]] = {}
        self._given_up: set[str] = set()

    def add(self, vector_table_id: str, keys: Iterable[Key]) -> bool:
        """Notes keys; False where the table is given up."""
        if vector_table_id in self._given_up:
            return False
        noted = self._keys.setdefault(vector_table_id, {})
        noted.update((encode_key(key), key) for key in keys)
        if len(noted) > self._max_keys:
            del self._keys[vector_table_id]
            self._given_up.add(vector_table_id)
            return False
        return True

    def tables(self) -> list[str]:
        """The vector tables of which anything was noted, given up or not."""
        return [*self._keys, *self._given_up]

    def count(self, vector_table_id: str) -> int:
        """How many keys are noted."""
        return len(self._keys.get(vector_table_id, ()))

    def take(self, vector_table_id: str) -> list[Key] | None:
        """The table's keys, which are forgotten here; None where it was given up."""
        if vector_table_id in self._given_up:
            self._given_up.discard(vector_table_id)
            return None
        return list(self._keys.pop(vector_table_id, {}).values())

    def put_back(self, vector_table_id: str, keys: Iterable[Key] | None) -> None:
        """Undoes a `take` whose keys could not be worked off; what was noted since stays."""
        if keys is None:
            self._keys.pop(vector_table_id, None)
            self._given_up.add(vector_table_id)
        else:
            self.add(vector_table_id, keys)
