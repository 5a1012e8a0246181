"""The API as a process of its own, started as `embedd up` starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from benchmarks.servers import ROOT

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ApiProcess:
    """Where it is, and how long it took from its start to the first answer of /health."""

    url: str
    pid: int
    start_seconds: float

    def cpu_seconds(self) -> float:
        """User and system time that the process has used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def client(self, key: str) -> httpx.Client:
        """A client with a key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False)


@contextmanager
def running_api(
    environment: Mapping[str, str],
    *,
    checkout: Path = ROOT,
    package: str = "embedd_api",
    **settings: object,
) -> Iterator[ApiProcess]:
    """One worker with these settings (`EMBEDD_…` in small letters); its log goes to a file, as under the supervisor."""
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    given = {f"EMBEDD_{name.upper()}": str(value) for name, value in settings.items()}
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        f"{package}.app:create_app",
        "--factory",
        "--host",
        LOOPBACK,
        "--port",
        str(port),
        "--http",
        f"{package}.http_limits:LimitedHttp",
    ]
    with tempfile.TemporaryFile() as log:
        begun = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=checkout, env={**os.environ, **environment, **given}, stdout=log, stderr=log
        )
        try:
            url = f"http://{LOOPBACK}:{port}"
            yield ApiProcess(url, process.pid, _until_healthy(process, url) - begun)
        finally:
            process.terminate()
            process.wait(20)


def _until_healthy(process: subprocess.Popen[bytes], url: str) -> float:
    """The instant of the first 200."""
    deadline = time.perf_counter() + 120  # a busy machine
    with httpx.Client(trust_env=False) as client:
        while True:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return time.perf_counter()
            except httpx.TransportError:
                if process.poll() is not None or time.perf_counter() > deadline:
                    raise
            time.sleep(0.005)
