"""Fixtures for every test: a real PostgreSQL and a real Qdrant engine, started once per session; and the list of unit tests."""

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

# The same examples in every run, so that a failure is everybody's failure. `make fuzz` draws others. No limit on the time of one.
_ANY_SPEED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, print_blob=True, **_ANY_SPEED)
settings.register_profile("other", print_blob=True, **_ANY_SPEED)
settings.load_profile(os.environ.get("TEST_EXAMPLES", "same"))


_TESTS = Path(__file__).parent
UNIT_TESTS = [
    _TESTS / path
    for path in (
        "core",
        "connectors/http/test_base_url.py",
        "connectors/http/test_refusals.py",
        "connectors/test_network.py",
        "connectors/postgresql/cdc/test_pgoutput.py",
        "defs/test_reconcile.py",
        "docs/test_links.py",
        "docs/test_words.py",
        "engine/pacing/test_pacing.py",
        "engine/cdc/test_report.py",
        "test_cli.py",
        "test_errors.py",
        "test_no_vendor_names.py",
        "webserver/test_guard.py",
    )
]
"""Files and folders whose tests need no server: `make unit` runs them."""
_SERVERS = {"postgres", "database_url", "qdrant_url", "stack"}


def _is_unit(path: Path) -> bool:
    return any(path.is_relative_to(unit) for unit in UNIT_TESTS)


class _ByServers(LoadFileScheduling):
    """A file's tests run in one process, for the servers they share; all of `tests/e2e` in one, for one stack."""

    def _split_scope(self, nodeid: str) -> str:
        path: str = super()._split_scope(nodeid)
        return "tests/e2e" if path.startswith("tests/e2e/") else path


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit`, files without unit tests are not even imported: that would take most of the time."""
    if config.option.markexpr != "unit" or collection_path.is_dir():
        return None
    return None if _is_unit(collection_path) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the unit tests, and rejects one that uses a server.

    In parallel, `tests/e2e` begins first: it takes one process the longest, and mostly waits.
    """
    if gone := [str(path) for path in UNIT_TESTS if not path.exists()]:
        raise pytest.UsageError(f"UNIT_TESTS in tests/conftest.py names what is not there: {', '.join(gone)}")
    for item in items:
        if _is_unit(item.path):
            item.add_marker("unit")
            if used := _SERVERS & set(getattr(item, "fixturenames", ())):
                raise pytest.UsageError(f"{item.nodeid} is a unit test and uses {', '.join(used)}: see UNIT_TESTS.")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith("tests/e2e/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """How pytest-xdist hands out the tests; overrides `--dist`."""
    return _ByServers(config, log)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the developer's shell do not reach the tests."""
    for name in list(os.environ):
        if name.startswith(("EMBEDD_", "DAGSTER_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running PostgreSQL 18 with pgvector, for this test session."""
    with open_temporary_postgres(fsync="off") as server:
        yield server


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """An empty database for one test, as `postgresql://user:password@host:port/name`."""
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
    """A running Qdrant engine behind Qdrant's REST and gRPC protocols, for this test session."""
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
