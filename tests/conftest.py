"""Fixtures that every test may use: a real PostgreSQL and a real Qdrant engine, started once a session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from embedd_dagster.stack.postgres import EmbeddedPostgres, open_temporary_postgres

pytest_plugins = ["tests.support.synchronous_standby"]

# The same examples in every run: what fails for one fails for all, and whoever runs the tests first does not find what others
# did not. `make fuzz` draws others. The machine may be as slow as it is.
_ANY_SPEED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, print_blob=True, **_ANY_SPEED)
settings.register_profile("other", print_blob=True, **_ANY_SPEED)
settings.load_profile(os.environ.get("TEST_EXAMPLES", "same"))


class _ByServers(LoadFileScheduling):
    """A file's tests run in one process, for the servers they share; all of `tests/e2e` in one, for one stack."""

    def _split_scope(self, nodeid: str) -> str:
        path: str = super()._split_scope(nodeid)
        return "tests/e2e" if path.startswith("tests/e2e/") else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In parallel, those of `tests/e2e` begin first: they take one process the longest, and mostly wait."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith("tests/e2e/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """How pytest-xdist hands out the tests, whatever `--dist` says."""
    return _ByServers(config, log)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("EMBEDD_", "DAGSTER_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running PostgreSQL 18 with pgvector, of this test session alone."""
    with open_temporary_postgres(fsync="off") as server:
        yield server


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """An empty database of this test alone, as `postgresql://user:password@host:port/name`."""
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield postgres.url(name)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def qdrant_grpc_port() -> int:
    """The gRPC port of the Qdrant behind `qdrant_url`."""
    return int(os.environ.get("TEST_QDRANT_GRPC_PORT") or (6334 if "TEST_QDRANT_URL" in os.environ else _free_port()))


@pytest.fixture(scope="session")
def qdrant_url(tmp_path_factory: pytest.TempPathFactory, qdrant_grpc_port: int) -> Iterator[str]:
    """A running Qdrant engine behind Qdrant's REST and gRPC protocols, of this test session alone."""
    if external := os.environ.get("TEST_QDRANT_URL"):
        yield external
        return
    folder: Path = tmp_path_factory.mktemp("qdrant")
    port = _free_port()
    command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server", "--data", str(folder), "--port", str(port)]
    command += ["--grpc-port", str(qdrant_grpc_port)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(f"{url}/readyz", server)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"{url} did not become ready")
