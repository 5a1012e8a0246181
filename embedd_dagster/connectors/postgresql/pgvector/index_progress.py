"""How far PostgreSQL is with building an index: asked on a second connection, since the first one waits for the build."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from psycopg import sql

from embedd_dagster.connectors.postgresql.pgvector.database import Database
from embedd_dagster.connectors.postgresql.pgvector.objects import OwnedRelation
from embedd_dagster.errors import EmbeddError
from embedd_dagster.protocols.store import ReportIndexed

# by the table and not by the process: behind a pooler, nobody knows the server's process
_PROGRESS: Final = sql.SQL("""
    SELECT p.blocks_done, p.blocks_total, c.reltuples::int8
    FROM pg_catalog.pg_stat_progress_create_index p
        JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) p.relid
    WHERE p.relid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({})::pg_catalog.oid""")


@contextmanager
def reported_build(database: Database, place: OwnedRelation, report: ReportIndexed, seconds: float) -> Iterator[None]:
    """Calls `report` at this interval, from another thread, while an index over the table is built in the block.

    PostgreSQL counts the blocks of the table that it has read; `report` gets that share of the rows. What `report` raises
    is raised at the end of the block.
    """
    ended = threading.Event()
    raised: list[BaseException] = []

    def watch() -> None:
        while not ended.wait(seconds):
            try:
                progress = _read(database, place)
                if progress is not None:
                    report(*progress)
            except EmbeddError as error:
                raised.append(error)
                return

    watcher = threading.Thread(target=watch, name="index progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    if raised:
        raise raised[0]


def _read(database: Database, place: OwnedRelation) -> tuple[int, int] | None:
    """(rows indexed, rows of the table); None while no index is built."""
    with database.transaction(timeout_seconds=10) as connection:
        name = place.identifier.as_string(connection)
        found = connection.execute(_PROGRESS.format(sql.Literal(name))).fetchone()
    if found is None or not found[1]:
        return None
    blocks_done, blocks_total, rows = found
    rows = max(rows, 0)
    return rows * min(blocks_done, blocks_total) // blocks_total, rows
