"""Secrets that are unlike anything else, and the search for them wherever they must not be."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg


def _canary(kind: str) -> str:
    return f"canary-{kind}-{uuid4().hex}"


@dataclass(frozen=True)
class Canaries:
    """One of each kind of what must stay where it is."""

    source_password: str = field(default_factory=lambda: _canary("password"))
    provider_key: str = field(default_factory=lambda: _canary("provider"))
    wrong_provider_key: str = field(default_factory=lambda: _canary("wrongkey"))
    row: str = field(default_factory=lambda: _canary("row"))
    metadata: str = field(default_factory=lambda: _canary("metadata"))
    query: str = field(default_factory=lambda: _canary("query"))
    more: dict[str, str] = field(default_factory=dict)
    """API keys and encryption keys, made elsewhere."""

    @property
    def all(self) -> dict[str, str]:
        """By name."""
        own = ("source_password", "provider_key", "wrong_provider_key", "row", "metadata", "query")
        return {**{name: getattr(self, name) for name in own}, **self.more}

    @property
    def contents(self) -> tuple[str, ...]:
        """Those that a row holds: they are at home in the vector store and in what a query answers."""
        return (self.row, self.metadata)

    def found_in(self, content: bytes | str, *, but: tuple[str, ...] = ()) -> list[str]:
        """The names of those that are in there: as they are, as base64, as hex."""
        data = content.encode() if isinstance(content, str) else content
        return [
            name
            for name, secret in self.all.items()
            if secret not in but and any(form in data for form in _forms(secret))
        ]


def _forms(secret: str) -> Iterator[bytes]:
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    # without the ends, which depend on what stands next to it
    for shift in range(3):
        yield base64.b64encode(b"\0" * shift + raw)[8:-8]


def search_database(url: str, canaries: Canaries, *, skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """By table, the canaries that stand in any column of any table of a database, of any type."""
    found: dict[str, list[str]] = {}
    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute(
            """SELECT format('%I.%I', schemaname, tablename), tablename FROM pg_tables
            WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"""
        ).fetchall()
        for table, name in tables:
            if name in skip:
                continue
            rows = connection.execute(f"SELECT t.*, to_jsonb(t)::text FROM {table} t").fetchall()
            for row in rows:
                for value in row:
                    data = bytes(value) if isinstance(value, bytes | memoryview) else str(value)
                    if names := canaries.found_in(data):
                        found.setdefault(table, []).extend(names)
    return found


def search_files(folder: Path, canaries: Canaries, *, skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """By path, the canaries that stand in any file under a folder; `skip` are folders right under it."""
    found: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        if path.relative_to(folder).parts[0] in skip or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if names := canaries.found_in(data):
            found[str(path)] = names
    return found
