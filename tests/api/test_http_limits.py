"""What a client may send and keep open, over raw sockets and Uvicorn itself."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from api.http_limits import HttpLimits, LimitedHttp
from api.middleware import BodyBudget, BodyShare
from embedd_dagster.settings import Settings
from tests.support.serving import serving

_ROOT = Path(__file__).parents[2]
_PATIENCE = 60.0
_GET = b"GET /health HTTP/1.1\r\nHost: api.test\r\n"


class _Short(LimitedHttp):
    """The same limits with short times, so that the tests are quick."""

    limits = HttpLimits(head_seconds=0.5, body_seconds=0.5, unread_seconds=1.0, linger_seconds=1.0)


class _Few(LimitedHttp):
    """Twenty connections and long times: what goes, goes to make room."""

    limits = HttpLimits(connections=20)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of the error envelope, which must be complete."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"code", "message", "resolution", "docs_url", "request_id"}
        assert all(error.values())
        assert error["request_id"] == self.headers["x-request-id"]
        assert error["docs_url"].endswith(f"/docs/errors#{error['code']}")
        return str(error["code"])


@pytest.fixture(scope="module")
def port(client: TestClient) -> Iterator[int]:
    with serving(client.app, http=LimitedHttp) as found:
        yield found


@pytest.fixture(scope="module")
def short_port(client: TestClient) -> Iterator[int]:
    with serving(client.app, http=_Short) as found:
        yield found


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)


def _replies(sock: socket.socket) -> list[Reply]:
    """All that come until the server ends the connection."""
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
    except ConnectionError:
        pass
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", 0))
        found.append(Reply(int(status.split()[1]), headers, rest[:size]))
        received = rest[size:]
    return found


def _send_until_refused(sock: socket.socket, first: bytes, piece: bytes, most: int) -> int:
    """How many bytes could be sent before an answer came; at most so many are tried."""
    sent = 0
    try:
        sock.sendall(first)
        while sent < most and not select.select([sock], [], [], 0)[0]:
            sock.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (_GET + b"X-Long: ", b"a" * 16384),
        (_GET, b"X-Short: a\r\n" * 1000),
        (b"GET /", b"a" * 16384),
    ],
    ids=["one header", "many headers", "path"],
)
def test_endless_head_is_a_431_and_its_connection_ends(port: int, first: bytes, piece: bytes) -> None:
    with closing(_connect(port)) as sock:
        sent = _send_until_refused(sock, first, piece, 64 * 2**20)
        replies = _replies(sock)
    assert sent < 8 * 2**20
    assert [(reply.status, reply.headers["connection"], reply.code) for reply in replies] == [
        (431, "close", "headers_too_large")
    ]


def test_endless_blank_lines_before_a_request_end_the_connection(port: int) -> None:
    with closing(_connect(port)) as sock:
        sent = _send_until_refused(sock, b"", b"\r\n" * 8192, 64 * 2**20)
        assert [reply.status for reply in _replies(sock)] == [431]
    assert sent < 8 * 2**20


def test_more_than_100_headers_in_one_piece_are_a_431(port: int) -> None:
    with closing(_connect(port)) as sock:
        sock.sendall(_GET + b"".join(b"X-%d: a\r\n" % n for n in range(100)) + b"\r\n")
        assert [reply.code for reply in _replies(sock)] == ["headers_too_large"]


def test_large_head_in_one_piece_is_a_431(port: int) -> None:
    with closing(_connect(port)) as sock:
        sock.sendall(_GET + b"X-Long: " + b"a" * 70_000 + b"\r\n\r\n")
        assert [reply.code for reply in _replies(sock)] == ["headers_too_large"]


def test_head_of_60_kib_with_99_headers_is_answered(port: int) -> None:
    with closing(_connect(port)) as sock:
        more = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 600) for n in range(97))
        sock.sendall(_GET + more + b"Connection: close\r\n\r\n")
        assert [reply.status for reply in _replies(sock)] == [200]


def test_small_head_with_a_large_body_in_one_piece_is_no_large_head(port: int) -> None:
    body = b"x" * 500_000
    with closing(_connect(port)) as sock:
        head = b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        sock.sendall(head + body)
        assert [reply.code for reply in _replies(sock)] == ["unauthorized"]


def test_what_is_not_http_is_a_400_in_the_envelope(port: int) -> None:
    with closing(_connect(port)) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 what a TLS client says first\r\n\r\n")
        assert [(reply.status, reply.code) for reply in _replies(sock)] == [(400, "malformed_request")]


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /",
        _GET + b"X-Slow: a",
        b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        _GET + b"\r\n" + _GET,
    ],
    ids=["path", "head", "body", "chunked body", "second head"],
)
def test_request_that_trickles_is_a_408(short_port: int, begin: bytes) -> None:
    with closing(_connect(short_port)) as sock:
        sock.sendall(begin)
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.1):
                try:
                    sock.sendall(b"1")
                except OSError:
                    return

        sender = threading.Thread(target=trickle)
        # a chunk's size does not go on and on
        if b"chunked" not in begin:
            sender.start()
        replies = _replies(sock)
        stop.set()
        if sender.ident is not None:
            sender.join()
    assert (replies[-1].status, replies[-1].code) == (408, "request_timeout")


def test_request_that_is_being_answered_is_not_timed_out(client: TestClient) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        import asyncio

        await receive()
        await asyncio.sleep(2.5)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with serving(slow, http=_Short) as port, closing(_connect(port)) as sock:
        # with the begin of a second one, which is late only once the first is answered
        sock.sendall(_GET + b"\r\n" + b"GET /")
        replies = _replies(sock)
    assert [reply.status for reply in replies] == [200, 408]


def test_connection_that_says_nothing_is_closed(client: TestClient) -> None:
    with serving(client.app, http=LimitedHttp, timeout_keep_alive=1) as port, closing(_connect(port)) as sock:
        assert _replies(sock) == []


def test_client_that_does_not_read_its_answers_is_cut_off(client: TestClient) -> None:
    with serving(client.app, http=_Short, timeout_keep_alive=1) as port, closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(_PATIENCE)
        sock.connect(("127.0.0.1", port))
        request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
        try:
            for _ in range(200):
                sock.sendall(request)
        except OSError:
            pass
        _until(lambda: _server_side(port) == 0)


def _server_side(port: int) -> int:
    """How many connections of this process' server at the port are open."""
    return sum(
        found.status == psutil.CONN_ESTABLISHED and found.laddr.port == port
        for found in psutil.Process().net_connections("tcp")
        if found.raddr
    )


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_sent_ahead_are_answered_in_order(port: int) -> None:
    with closing(_connect(port)) as sock:
        last = b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        sock.sendall((_GET + b"\r\n") * 10 + last)
        assert [reply.status for reply in _replies(sock)] == [200] * 10 + [404]


def test_thousands_of_requests_sent_ahead_end_the_connection(port: int) -> None:
    with closing(_connect(port)) as sock:
        with suppress(OSError):
            sock.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 10_000)
        assert len(_replies(sock)) <= 20


def test_malformed_request_behind_a_good_one_never_takes_its_answer(port: int) -> None:
    with closing(_connect(port)) as sock:
        sock.sendall(_GET + b"\r\nNONSENSE\r\n\r\n")
        assert [reply.status for reply in _replies(sock)] == [200]


@pytest.mark.parametrize(
    "trailer",
    [b"0\r\nX-Trailer: ", b"0\r\n" + b"X: 1\r\n" * 10, b"1;extension="],
    ids=["one trailer", "many trailers", "chunk extension"],
)
def test_chunked_body_without_end_is_refused(port: int, trailer: bytes) -> None:
    head = b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"X: 1\r\n" * 2000 if b"X: 1" in trailer else b"a" * 16384
    with closing(_connect(port)) as sock:
        sent = _send_until_refused(sock, head + b"2\r\n{}\r\n" + trailer, piece, 64 * 2**20)
        assert sent < 8 * 2**20
        assert [reply.code for reply in _replies(sock)] == ["headers_too_large"]


def test_chunked_body_that_is_too_large_is_a_413(port: int) -> None:
    head = b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(_connect(port)) as sock:
        _send_until_refused(sock, head, b"4000\r\n" + b"a" * 16384 + b"\r\n", 64 * 2**20)
        assert [reply.code for reply in _replies(sock)] == ["payload_too_large"]


def test_trailers_do_not_reach_the_application(port: int) -> None:
    head = b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(_connect(port)) as sock:
        sock.sendall(head + b"2\r\n{}\r\n0\r\nX-Request-Id: smuggled\r\nAuthorization: Bearer sk_x\r\n\r\n")
        (reply,) = _replies(sock)
    assert reply.code == "unauthorized"
    assert "The request has no API key" in json.loads(reply.body)["error"]["message"]


def test_websocket_is_not_spoken(port: int) -> None:
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    )
    with closing(_connect(port)) as sock:
        sock.sendall(_GET + upgrade)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_new_connections_are_served_however_many_wait(client: TestClient) -> None:
    with serving(client.app, http=_Few) as port, ExitStack() as open_ones:
        for n in range(60):
            sock = open_ones.enter_context(closing(_connect(port)))
            sock.sendall((b"", _GET, b"POST /v1/api-keys HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")[n % 3])
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=_PATIENCE, trust_env=False).status_code == 200
        _until(lambda: _server_side(port) <= 25)


def test_connection_beyond_the_limit_is_a_503_while_all_are_at_work() -> None:
    release = threading.Event()

    async def held(scope: Any, receive: Any, send: Any) -> None:
        import asyncio

        await receive()
        while not release.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    with serving(held, http=_Few) as port, ExitStack() as open_ones:
        at_work = [open_ones.enter_context(closing(_connect(port))) for _ in range(20)]
        for sock in at_work:
            sock.sendall(_GET + b"Connection: close\r\n\r\n")
        with closing(_connect(port)) as one_more:
            one_more.sendall(_GET + b"\r\n")
            (reply,) = _replies(one_more)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "server_busy", "1")
        release.set()
        assert [[reply.status for reply in _replies(sock)] for sock in at_work] == [[200]] * 20


def test_all_bodies_together_have_a_limit() -> None:
    budget = BodyBudget(1_000_000)
    first, second, third = (BodyShare(budget) for _ in range(3))
    assert first.grow(600_000)
    assert not second.grow(600_000)
    assert second.grow(500_000)
    assert third.grow(65_536)
    assert not third.grow(200_000)
    first.release()
    assert third.grow(200_000)
    for share in (first, second, third):
        share.release()
    assert budget.left == 1_000_000


@contextmanager
def _api_process(settings: Settings, descriptors: int) -> Iterator[tuple[psutil.Process, str]]:
    """The API as it is started in production, with so many file descriptors."""
    environment = {
        **os.environ,
        "EMBEDD_DATABASE_URL": settings.database_url.get_secret_value(),
        "EMBEDD_ENCRYPTION_KEYS": ",".join(key.get_secret_value() for key in settings.encryption_keys),
        "EMBEDD_QDRANT_URL": settings.qdrant_url,
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "embedd_api.app:create_app", "--factory", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--http", "embedd_api.http_limits:LimitedHttp"],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # what the server allows itself is counted at its first connection
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE, (descriptors, descriptors))
    url = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: _is_healthy(url))
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait(60)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=_PATIENCE, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_idle_and_half_sent_requests_neither_take_the_descriptors_nor_the_memory(settings: Settings) -> None:
    with _api_process(settings, 128) as (process, url), ExitStack() as open_ones:
        port = int(url.rpartition(":")[2])
        for _ in range(200):
            open_ones.enter_context(closing(_connect(port)))
        assert _is_healthy(url)
        # with the catalog, for which descriptors must be left
        assert httpx.get(f"{url}/v1/tasks", headers={"Authorization": f"Bearer sk_{'x' * 43}"}).status_code == 401
        before = process.memory_info().rss
        for _ in range(1500):
            sock = open_ones.enter_context(closing(_connect(port)))
            sock.sendall(_GET + b"X-Long: " + b"a" * 20_000)
        assert _is_healthy(url)
        assert process.num_fds() < 128
        assert process.memory_info().rss - before < 50 * 2**20
