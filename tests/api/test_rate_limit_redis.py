"""The rate limit over a real Redis: counted across processes, and never in the way when Redis is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from fastapi.testclient import TestClient
from pydantic import SecretStr

from tests.api.tenants import Tenant, code_of

_PROGRAM = shutil.which("redis-server")
if _PROGRAM is None and os.environ.get("CI") != "true":
    pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)", allow_module_level=True)


class RedisServer:
    """A redis-server of this test alone, without persistence."""

    def __init__(self, folder: Path) -> None:
        assert _PROGRAM is not None, "CI needs redis-server: see .ci/run"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}/0"
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        self.process = subprocess.Popen([_PROGRAM, *options], stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.02)
        client.close()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    yield running
    running.close()


@pytest.fixture
def start(app_with: Callable[..., TestClient], server: RedisServer) -> Callable[[], TestClient]:
    return lambda: app_with(rate_limit_per_minute=5, redis_url=SecretStr(server.url))


def _get(client: TestClient, tenant: Tenant, key: str | None = None) -> httpx.Response:
    return client.get("/v1/environments", headers={"Authorization": f"Bearer {key or tenant.key}"})


def test_requests_are_counted_across_processes(start: Callable[[], TestClient], tenant: Tenant) -> None:
    first, second = start(), start()
    left = [
        int(_get(client, tenant).headers["x-ratelimit-remaining"]) for client in (first, second, first, second, first)
    ]
    assert left == [4, 3, 2, 1, 0]
    for client in (first, second):
        refused = _get(client, tenant)
        assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-limit"] == "5"
        assert 0 < int(refused.headers["x-ratelimit-reset"]) - time.time() <= 61
    # another key has a window of its own
    assert _get(second, tenant, tenant.new_key()).headers["x-ratelimit-remaining"] == "4"


def test_the_window_outlives_the_process(start: Callable[[], TestClient], tenant: Tenant) -> None:
    with start() as client:
        assert _get(client, tenant).headers["x-ratelimit-remaining"] == "4"
    assert _get(start(), tenant).headers["x-ratelimit-remaining"] == "3"


def test_no_key_is_in_redis(start: Callable[[], TestClient], server: RedisServer, tenant: Tenant) -> None:
    _get(start(), tenant)
    client = redis.Redis.from_url(server.url)
    names = [name.decode() for name in client.scan_iter()]
    client.close()
    assert names
    assert not any(tenant.key in name or tenant.key[:12] in name for name in names)


def test_requests_pass_when_redis_is_gone(
    start: Callable[[], TestClient], server: RedisServer, tenant: Tenant, capfd: pytest.CaptureFixture[str]
) -> None:
    client = start()
    assert _get(client, tenant).headers["x-ratelimit-remaining"] == "4"
    server.process.kill()
    server.process.wait(10)
    response = _get(client, tenant)
    assert response.status_code == 200
    assert "x-ratelimit-remaining" not in response.headers
    assert "rate limit not counted" in capfd.readouterr().err


def test_a_hung_redis_holds_no_request_long(
    start: Callable[[], TestClient], server: RedisServer, tenant: Tenant
) -> None:
    client = start()
    _get(client, tenant)
    server.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert _get(client, tenant).status_code == 200
    assert time.monotonic() - begun < 3
