"""`make bench-follow`: from a commit in the source until the row is found, and how many changes per second are kept up with.

A consumer in a process of its own, as its run would be, over an indexed table of 100,000 rows; this process writes to the
source at a steady rate, one transaction a change, and looks at the store for a tenth of the rows until they are there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg

from benchmarks import data
from benchmarks.ours import Bench
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers, open_servers
from embedd_dagster.catalog import cdc, resyncs, vector_sets, vector_tables
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode, SyncMode
from embedd_dagster.engine.cdc.consumer import run_consumer
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.protocols.store import Store
from embedd_dagster.settings import read_settings

ROWS = 100_000
SAMPLED = 0.1


@contextmanager
def _following(bench: Bench) -> Iterator[None]:
    """A consumer in its own thread, with no resync pending."""
    command = [sys.executable, "-m", "benchmarks.follow", "--consumer", bench.connection_id]
    process = subprocess.Popen(command, cwd=ROOT, env=bench.environment())
    try:
        while True:
            with bench.runtime.catalog.transaction() as session:
                pending = resyncs.due(session, 1)
                found = vector_tables.find(session, bench.vector_table_id)
            if pending:
                bench.run(TaskType.SYNC)
            elif found is not None and found.cdc.subscribed_since is not None:
                break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _be_the_consumer(connection_id: str) -> None:
    with Runtime.open(read_settings()) as runtime:
        run_consumer(
            runtime,
            connection_id,
            uuid4().hex,
            log=lambda _line: None,
            report=lambda _report: None,
            should_stop=lambda: False,
        )


def _live_set(bench: Bench) -> VectorSet:
    with bench.runtime.catalog.transaction() as session:
        found = vector_tables.find(session, bench.vector_table_id)
        assert found is not None
        return vector_sets.as_vector_set(
            vector_sets.get(session, found.id, found.live_version or 0), found.storage_name
        )  # fmt: skip


def _open_store(bench: Bench, mode: Mode) -> Store:
    with bench.runtime.catalog.transaction() as session:
        endpoints = vector_tables.load_endpoints(session, bench.vector_table_id)
    assert endpoints is not None
    return bench.runtime.open_store(mode, endpoints.connection)


def _until_found(store: Store, live: VectorSet, key: int, before: int | None, committed: float) -> float:
    while True:
        found = store.vectors(live, [key]).get(key)
        if found is not None and found[0] != before:
            return time.perf_counter() - committed
        if time.perf_counter() - committed > 60:
            raise TimeoutError(f"row {key} is not found")
        time.sleep(0.005)


def measure_latency(servers: Servers, bench: Bench, mode: Mode, rows: int, rate: int, seconds: float) -> list[float]:
    """Seconds from a commit until the store has the row, of a sample of single changes at this rate."""
    live, latencies, watchers = _live_set(bench), list[float](), list[threading.Thread]()
    chosen = random.Random(rate)
    keys = chosen.sample(range(1, rows + 1), int(rate * seconds))
    with _open_store(bench, mode) as store, psycopg.connect(servers.database_url, autocommit=True) as connection:
        begun = time.perf_counter()
        for number, key in enumerate(keys):
            watched = chosen.random() < SAMPLED
            before = store.vectors(live, [key])[key][0] if watched else None
            connection.execute(f"UPDATE {data.TABLE} SET body = body || ' changed' WHERE id = %s", [key])
            if watched:
                committed = time.perf_counter()

                def watch(key: int = key, before: int | None = before, committed: float = committed) -> None:
                    latencies.append(_until_found(store, live, key, before, committed))

                watchers.append(threading.Thread(target=watch))
                watchers[-1].start()
            time.sleep(max(0.0, begun + (number + 1) / rate - time.perf_counter()))
        for watcher in watchers:
            watcher.join()
    return latencies


def measure_throughput(servers: Servers, bench: Bench, mode: Mode, changes: int, rows_a_transaction: int) -> float:
    """Changes per second from the first commit until the last one is found, written as fast as the source takes them."""
    live = _live_set(bench)
    with _open_store(bench, mode) as store, psycopg.connect(servers.database_url, autocommit=True) as connection:
        last = changes
        before = store.vectors(live, [last])[last][0]
        begun = time.perf_counter()
        for start in range(1, changes + 1, rows_a_transaction):
            connection.execute(
                f"UPDATE {data.TABLE} SET body = body || ' again' WHERE id >= %s AND id < %s",
                [start, start + rows_a_transaction],
            )
        _until_found(store, live, last, before, time.perf_counter())
        return changes / (time.perf_counter() - begun)


def measure(servers: Servers, seconds: float, rows: int) -> None:
    """Both stores at each rate."""
    data.create_table(servers.database_url, rows)
    lines: list[list[object]] = []
    for mode in (Mode.PLATFORM, Mode.MANAGED):
        servers.provider.behave(latency_seconds=0)
        bench = Bench(servers, mode, 384, sync_mode=SyncMode.CDC)
        bench.run()
        servers.provider.behave(latency_seconds=0.02)
        with _following(bench):
            for rate in (10, 100):
                found = sorted(measure_latency(servers, bench, mode, rows, rate, seconds))
                p50, p95 = statistics.median(found), found[int(0.95 * (len(found) - 1))]
                lines.append(
                    [_store(mode), f"{rate} a second", f"{1000 * p50:.0f}", f"{1000 * p95:.0f}", len(found), ""]
                )
                print(lines[-1], flush=True)
            for rows_a_transaction in (1, 100):
                changed = min(rows, 20_000)
                rate = measure_throughput(servers, bench, mode, changed, rows_a_transaction)
                how = f"{changed:,} as fast as they are written, {rows_a_transaction} a transaction"
                lines.append([_store(mode), how, "", "", "", f"{rate:,.0f}"])
                print(lines[-1], flush=True)
            with bench.runtime.catalog.transaction() as session:
                feed = cdc.find(session, bench.connection_id)
                assert feed is not None
        bench.close()
    heads = ["store", "changes", "p50, ms", "p95, ms", "sampled", "changes per second, sustained"]
    body = (
        f"A table of {rows:,} rows, 384 dimensions, indexed; every change is a text that has to be embedded again, by a"
        " provider that answers after 20 ms. Targets: p95 below 1,000 ms at 100 changes per second, 1,000 changes per second "
        "sustained.\n\n"
        f"{table(heads, lines)}"
    )
    record("follow", "CDC", body, {"lines": lines}, "make bench-follow")


def _store(mode: Mode) -> str:
    return "pgvector" if mode is Mode.PLATFORM else "Qdrant"


def main() -> None:
    """Everything, or (in a process of its own) the consumer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--consumer", metavar="CONNECTION_ID", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    if options.consumer:
        _be_the_consumer(options.consumer)
        return
    with open_servers() as servers:
        measure(servers, options.seconds, options.rows)


if __name__ == "__main__":
    main()
