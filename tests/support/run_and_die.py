"""Runs one task in a process of its own and kills it (SIGKILL) at a named point: the crash tests' victim.

Called with the settings in the environment: `run_and_die.py TASK_ID RUN_ID POINT NTH`. A point is `before:` or `after:`
and one of the functions below; the process dies at its NTH call.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from embedd_dagster.catalog import shard_checkpoints, tasks, vector_sets
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.connectors.postgresql.reader import PostgresTableReader
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.engine import backfill
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.engine.run import run_task
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import read_settings

POINTS: dict[str, list[tuple[Any, str]]] = {
    "read": [(PostgresTableReader, "read")],
    "create": [(QdrantStore, "create"), (PgvectorStore, "create")],
    "embed": [(PacedEmbedder, "embed")],
    "upsert": [(QdrantStore, "upsert"), (PgvectorStore, "upsert")],
    "checkpoint": [(shard_checkpoints, "record")],
    "catch_up": [(backfill, "_catch_up")],
    "index": [(QdrantStore, "finish_load"), (PgvectorStore, "finish_load")],
    "publish": [(QdrantStore, "publish"), (PgvectorStore, "publish")],
    "mark_live": [(vector_sets, "mark_live")],
    "complete": [(tasks, "complete")],
}


def die_at(owner: Any, name: str, when: str, nth: int) -> None:
    """From now on the process kills itself `before` or `after` the nth call of this function."""
    original: Callable[..., Any] = getattr(owner, name)
    lock = threading.Lock()
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls
        if when == "before" and mine == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if when == "after" and mine == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def main() -> None:
    task_id, run_id, point, nth = sys.argv[1:]
    when, _, name = point.partition(":")
    for owner, attribute in POINTS[name]:
        die_at(owner, attribute, when, int(nth))
    with Runtime.open(read_settings()) as runtime:
        run_task(runtime, task_id, run_id, log=lambda _message: None, should_stop=lambda: False)


if __name__ == "__main__":
    main()
