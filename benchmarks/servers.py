"""What every benchmark runs against: PostgreSQL, the embedded Qdrant server and the loopback provider, each a process."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg

from embedd_dagster.stack.postgres import open_temporary_postgres
from tests.support.openai_server import RunningServer, running_openai_server

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Servers:
    """Where they are."""

    database_url: str
    qdrant_url: str
    qdrant_grpc_port: int
    provider: RunningServer

    def sql(self, statement: str, *parameters: object) -> list[tuple]:
        """One statement in a connection of its own."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []


@contextmanager
def open_servers(qdrant_url: str | None = None) -> Iterator[Servers]:
    """All of them, with a fresh database; gone at the end."""
    with ExitStack() as stack:
        provider = stack.enter_context(running_openai_server(latency_seconds=0.02))
        postgres = stack.enter_context(open_temporary_postgres(shared_buffers="512MB", max_wal_size="4GB"))
        url = postgres.ensure_database("bench")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        qdrant = (qdrant_url, 6334) if qdrant_url else stack.enter_context(_running_qdrant())
        yield Servers(url, *qdrant, provider)


@contextmanager
def _running_qdrant() -> Iterator[tuple[str, int]]:
    """Its URL and its gRPC port."""
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as another:
        port, grpc_port = free.getsockname()[1], another.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="embedd-bench-qdrant-") as directory:
        command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server", "--data", directory, "--port", str(port)]
        command += ["--grpc-port", str(grpc_port)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 30
            while True:
                try:
                    httpx.get(f"{url}/readyz", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
            yield url, grpc_port
        finally:
            process.terminate()
            process.wait(20)
