"""A CDC source without the engine: a stream, what it gave, and questions to the server itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.errors import (
    EmbeddError,
)
from embedd_dagster.protocols.cdc import CdcStream, CdcTable, ChangeBatch, Subscription, TableFingerprint
from embedd_dagster.protocols.source import Source

Admin = psycopg.Connection[Any]
T = CdcTable("t", "id")


def credentials_of(url: str, **changes: Any) -> dict[str, Any]:
    parts = conninfo_to_dict(url)
    return {
        "host": parts["host"],
        "port": int(str(parts["port"])),
        "database": parts["dbname"],
        "user": parts["user"],
        "password": parts["password"],
        **changes,
    }


class StreamReader:
    """A feed with the position and the shapes that a consumer keeps."""

    def __init__(self, feed: CdcStream, *tables: CdcTable) -> None:
        self.feed = feed
        self.tables = tables
        self.position: str | None = None
        self.fingerprints: Mapping[CdcTable, TableFingerprint] = {}

    def subscribe(self) -> Subscription:
        subscription = self.feed.subscribe(self.tables, self.position, self.fingerprints)
        self.fingerprints = subscription.table_fingerprints
        if self.position is None or subscription.lost:
            self.position = subscription.position
        return subscription

    def read(self, *, max_keys: int = 1000, confirm: bool = True) -> list[ChangeBatch]:
        batches = list(self.feed.read(max_keys=max_keys))
        assert batches[-1].position is not None
        if confirm:
            self.position = batches[-1].position
            self.feed.confirm(self.position)
        return batches

    def keys(self, table: CdcTable = T) -> list[Any]:
        batches = self.read()
        assert not any(batch.broken or batch.truncated for batch in batches)
        assert all(other in (*self.tables, table) for batch in batches for other in batch.keys)
        return [key for batch in batches for key in batch.keys.get(table, [])]


def one(connection: Admin, statement: str, *parameters: Any) -> Any:
    row = connection.execute(statement, parameters).fetchone()
    return row[0] if row else None


def published(admin: Admin, name: str) -> set[str]:
    rows = admin.execute("SELECT tablename FROM pg_publication_tables WHERE pubname = %s", [name]).fetchall()
    return {row[0] for row in rows}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def statements_of(error: EmbeddError) -> str:
    return error.resolution.partition("administrator: ")[2]


def refusal(source: Source, table: CdcTable) -> EmbeddError:
    with pytest.raises(EmbeddError) as caught:
        source.check_cdc_eligible(table)
    return caught.value
