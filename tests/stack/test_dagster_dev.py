"""`dagster dev` in the root of a checkout, as `make setup` leaves it: no PostgreSQL, no Qdrant, no variable set."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from embedd_dagster.stack.ports import Ports

ROOT = Path(__file__).parents[2]
COPIED = ("dagster.yaml", "workspace.yaml", "pyproject.toml", "embedd_dagster", "api")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout's root after `make setup`, except for the virtual environment."""
    root = tmp_path / "a checkout"
    root.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    runpy.run_path(str(ROOT / "scripts" / "setup.py"))["write_dagster_home"](root)
    return root


@pytest.fixture
def dagster_dev(checkout: Path) -> Iterator[str]:
    """The URL of a `dagster dev` that runs in the checkout."""
    port = Ports(checkout / "ports.json").claim("dagster-webserver")
    with (checkout / "dev.log").open("wb") as log:
        command = [sys.executable, "-m", "dagster", "dev", "--port", str(port)]
        server = subprocess.Popen(
            command,
            cwd=checkout,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_heed_interrupts,  # noqa: PLW1509 - no other thread runs
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(f"{url}/server_info", server, checkout / "dev.log")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def _heed_interrupts() -> None:
    """Programs that a shell has started in the background ignore SIGINT, and so would those that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


def test_dagster_dev_loads_the_assets_without_a_database(dagster_dev: str, checkout: Path) -> None:
    query = "{ assetNodes { assetKey { path } } instance { info } }"
    answer = httpx.post(f"{dagster_dev}/graphql", json={"query": query}, timeout=120, trust_env=False).json()["data"]
    assert ["vector_table"] in [node["assetKey"]["path"] for node in answer["assetNodes"]]
    assert str(checkout / ".dagster") in " ".join(answer["instance"]["info"].split())  # YAML breaks long lines


def test_the_env_file_does_not_override_the_dagster_home_of_embedd_up(checkout: Path) -> None:
    command = [sys.executable, "-m", "dagster", "instance", "info"]
    environment = {**os.environ, "DAGSTER_HOME": str(checkout / "api")}
    shown = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    assert str(checkout / "api") in shown.stdout
    assert ".dagster" not in shown.stdout


def test_setup_keeps_the_other_lines_of_an_env_file(checkout: Path) -> None:
    env = checkout / ".env"
    env.write_text("POSTGRES_PASSWORD=secret\nDAGSTER_HOME=/elsewhere\nQDRANT_API_KEY=key\n")
    runpy.run_path(str(ROOT / "scripts" / "setup.py"))["write_dagster_home"](checkout)
    assert env.read_text().splitlines() == [
        "POSTGRES_PASSWORD=secret",
        "QDRANT_API_KEY=key",
        f'DAGSTER_HOME="${{DAGSTER_HOME:-{checkout / ".dagster"}}}"',
    ]
