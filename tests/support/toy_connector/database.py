"""SQLite databases in memory, by name, each with a token that opens it."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any, Final

from embedd_dagster.errors import SourceAccessDenied
from tests.support.toy_connector.store import SetsInMemory


class Database:
    """One database, and the vectors that a platform store keeps in it."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.sets = SetsInMemory()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()

    def execute(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of the answer."""
        with self._lock:
            return self._connection.execute(statement, parameters).fetchall()


_DATABASES: Final[dict[str, Database]] = {}


def create_database(name: str, token: str) -> Database:
    """An empty database of this name; an earlier one is gone."""
    _DATABASES[name] = Database(token)
    return _DATABASES[name]


def open_database(name: str, token: str) -> Database:
    """The database. Raises SourceAccessDenied."""
    found = _DATABASES.get(name)
    if found is None or found.token != token:
        raise SourceAccessDenied(f"Database {name!r} does not exist or the token is wrong.")
    return found
