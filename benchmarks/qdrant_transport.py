"""CPU per point of bulk writes and vector reads, REST against gRPC: `python -m benchmarks.qdrant_transport`.

Over the embedded server, whose own work is Python; a real server costs less.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from uuid import uuid4

import httpx
import numpy as np
import psutil

from benchmarks.results import record, spread, table
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.vector_table import FilterType

BATCH = 256
DIMENSIONS = (384, 1536)
TYPES = {"category": FilterType.KEYWORD, "price": FilterType.FLOAT, "stock": FilterType.BOOLEAN}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def batches(count: int, dimensions: int) -> list[PointBatch]:
    vectors = np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)
    rows = [{"category": "kitchen", "price": round(n / 7, 2), "stock": n % 2 == 0} for n in range(count)]
    return [
        PointBatch(
            keys=list(range(start, stop)), texts=["lorem ipsum dolor sit amet " * 16] * (stop - start),
            metadata=rows[start:stop], row_hashes=[n * 7919 for n in range(start, stop)],
            text_hashes=[0] * (stop - start), buckets=[n % 65_536 for n in range(start, stop)],
            vectors=vectors[start:stop],
        )
        for start in range(0, count, BATCH)
        for stop in [min(start + BATCH, count)]
    ]  # fmt: skip


def cost(call: Callable[[], None], server: psutil.Process, count: int) -> tuple[float, float]:
    """Microseconds of CPU per point, of this process and of the server's."""
    own, before = time.process_time(), sum(server.cpu_times()[:2])
    call()
    return 1e6 * (time.process_time() - own) / count, 1e6 * (sum(server.cpu_times()[:2]) - before) / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server", "--data", data]
        process = subprocess.Popen([*command, "--port", str(port), "--grpc-port", str(grpc_port)])
        url = f"http://127.0.0.1:{port}"
        while not answers(url):
            time.sleep(0.1)
        try:
            found = measure(url, grpc_port, psutil.Process(process.pid), options.points, options.rounds)
        finally:
            process.terminate()
            process.wait(60)
    columns = ["dimensions", "what", "way", "client, µs a point", "server, µs a point"]
    rows = [[*key, spread([c for c, _ in costs], 0), spread([s for _, s in costs], 0)] for key, costs in found.items()]
    record(
        "qdrant_transport", "Qdrant: REST against gRPC", table(columns, rows),
        [{"case": key, "microseconds": costs} for key, costs in found.items()],
        f"python -m benchmarks.qdrant_transport --points {options.points} --rounds {options.rounds}",
    )  # fmt: skip


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def write(store: QdrantStore, vector_set: VectorSet, given: list[PointBatch]) -> None:
    for batch in given:
        store.upsert(vector_set, batch)


def read(store: QdrantStore, vector_set: VectorSet, given: list[PointBatch]) -> None:
    for batch in given:
        store.vectors(vector_set, batch.keys)


def measure(
    url: str, grpc_port: int, server: psutil.Process, count: int, rounds: int
) -> dict[tuple[int, str, str], list[tuple[float, float]]]:
    found: dict[tuple[int, str, str], list[tuple[float, float]]] = {}
    for dimensions in DIMENSIONS:
        given = batches(count, dimensions)
        for _ in range(rounds):
            for way, used in (("REST", None), ("gRPC", grpc_port)):
                name = f"vt_{uuid4().hex[:26]}"
                vector_set = VectorSet(name, 1, f"{name[:11]}_b", dimensions, TYPES)
                with QdrantStore(url, grpc_port=used) as store:
                    store.create(vector_set)
                    calls = {
                        "write": partial(write, store, vector_set, given),
                        "read vectors": partial(read, store, vector_set, given),
                    }
                    for what, call in calls.items():
                        found.setdefault((dimensions, what, way), []).append(cost(call, server, count))
                    store.drop(name, 1)
    return found


if __name__ == "__main__":
    main()
