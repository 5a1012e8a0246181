"""How answers and connections may end, against a server whose every byte is chosen."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from embedd_dagster.connectors.http.transport import LARGEST_ANSWER, VettedTransport
from tests.support.raw_server import OK, Serve, answering, fixed, read_request, serving

pytestmark = pytest.mark.timeout(60)


@contextmanager
def client() -> Iterator[httpx.Client]:
    transport = VettedTransport(tls=None, limits=httpx.Limits(max_keepalive_connections=4), deny_private_networks=False)
    with httpx.Client(transport=transport, trust_env=False, timeout=20) as http:
        yield http


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"\r\nwhole",
        OK + b"Connection: close\r\n\r\nwhole",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nwhole",
        OK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nwho\r\n2\r\nle\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5;name=value\r\nwhole\r\n0\r\nTrailer: yes\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nwhole",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nwhole",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nwhole",
        b"HTTP/1.1 100 Continue\r\n\r\n" + fixed(b"whole"),
        b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + fixed(b"whole"),
        fixed(gzip.compress(b"whole", mtime=0), b"Content-Encoding: gzip"),
        fixed(gzip.compress(b"wh", mtime=0) + gzip.compress(b"ole", mtime=0), b"Content-Encoding: GZIP"),
        fixed(zlib.compress(b"whole"), b"Content-Encoding: deflate"),
        fixed(zlib.compress(b"whole")[2:-4], b"Content-Encoding: deflate"),
        fixed(b"whole", b"Content-Encoding: identity"),
    ],
    ids=lambda answer: repr(answer[:60]),
)
def test_an_answer_is_read_to_its_end_in_every_form_of_http(answer: bytes) -> None:
    with serving(answering(answer)) as url, client() as http:
        response = http.post(url, content=b"x")
        assert (response.status_code, response.content) == (200, b"whole")


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 6\r\n\r\nwhole",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nwho",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nwhole\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-7\r\nwhole\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nwhole\r\n0\r\n\r\n",
        OK + b"Content-Length: %d\r\n\r\nwhole" % (LARGEST_ANSWER + 1),
        fixed(b"whole", b"Content-Encoding: gzip"),
        fixed(gzip.compress(b"whole", mtime=0)[:-3], b"Content-Encoding: gzip"),
        fixed(b"whole", b"Content-Encoding: deflate"),
        fixed(b"whole", b"Content-Encoding: br"),
        fixed(gzip.compress(bytes(LARGEST_ANSWER + 1), mtime=0), b"Content-Encoding: gzip"),
        fixed(zlib.compress(bytes(LARGEST_ANSWER + 1)), b"Content-Encoding: deflate"),
        b"HTTP/2 200\r\n\r\nwhole",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 2xx OK\r\n\r\n",
        b"",
    ],
    ids=lambda answer: repr(answer[:70]),
)
def test_an_answer_that_is_incomplete_too_large_or_not_http_is_a_protocol_error(answer: bytes) -> None:
    with serving(answering(answer)) as url, client() as http, pytest.raises(httpx.RemoteProtocolError):
        http.post(url, content=b"x")


def test_a_chunk_of_negative_size_is_not_read_endlessly() -> None:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n")
        while True:
            connection.sendall(bytes(2**20))

    with serving(serve) as url, client() as http, pytest.raises(httpx.RemoteProtocolError):
        http.post(url, content=b"x")


def test_bytes_after_an_answer_never_become_the_next_answer() -> None:
    poisoned = OK + b"Content-Length: 5\r\n\r\nwhole" + fixed(b"of nobody")
    with serving(answering(poisoned), answering(fixed(b"second"))) as url, client() as http:
        assert http.post(url, content=b"x").content == b"whole"
        assert http.post(url, content=b"x").content == b"second"


def test_unrequested_bytes_that_arrive_later_never_become_the_next_answer() -> None:
    sent = threading.Event()

    def serve(connection: socket.socket) -> None:
        answering(fixed(b"first"))(connection)
        connection.sendall(fixed(b"of nobody"))
        sent.set()
        connection.recv(1)

    with serving(serve, answering(fixed(b"second"))) as url, client() as http:
        assert http.post(url, content=b"x").content == b"first"
        assert sent.wait(10)
        assert http.post(url, content=b"x").content == b"second"


def test_one_connection_serves_many_requests() -> None:
    with serving(answering(fixed(b"first"), fixed(b"second"), fixed(b"third"))) as url, client() as http:
        assert [http.post(url, content=b"x").content for _ in range(3)] == [b"first", b"second", b"third"]


def _close_at_the_second_request(connection: socket.socket) -> None:
    answering(fixed(b"first"))(connection)
    read_request(connection)


def _reset_at_the_second_request(connection: socket.socket) -> None:
    answering(fixed(b"first"))(connection)
    connection.recv(1)  # what is not read of the request makes the end a reset


@pytest.mark.parametrize("close", [_close_at_the_second_request, _reset_at_the_second_request])
def test_a_request_on_a_kept_connection_that_the_server_closes_is_sent_once_more(close: Serve) -> None:
    with serving(close, answering(fixed(b"second"))) as url, client() as http:
        assert http.post(url, content=b"x").content == b"first"
        assert http.post(url, content=bytes(2**22)).content == b"second"


def test_a_request_is_sent_again_only_once_and_only_on_a_kept_connection() -> None:
    def ignore(connection: socket.socket) -> None:
        read_request(connection)

    with serving(_close_at_the_second_request, ignore, answering(fixed(b"third"))) as url, client() as http:
        assert http.post(url, content=b"x").content == b"first"
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(url, content=b"x")
        assert http.post(url, content=b"x").content == b"third"


def test_a_request_is_not_sent_again_when_a_part_of_its_answer_came() -> None:
    requests = []

    def serve(connection: socket.socket) -> None:
        answering(fixed(b"first"), OK + b"Content-Length: 5\r\n\r\nwho")(connection)
        requests.append("answered")

    with serving(serve, answering(fixed(b"third"))) as url, client() as http:
        http.post(url, content=b"x")
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(url, content=b"x")
        assert requests == ["answered"]
        assert http.post(url, content=b"x").content == b"third"


def test_a_request_that_times_out_is_not_sent_again() -> None:
    def serve(connection: socket.socket) -> None:
        answering(fixed(b"first"))(connection)
        read_request(connection)
        connection.recv(1)

    with serving(serve, answering(fixed(b"third"))) as url, client() as http:
        http.post(url, content=b"x")
        with pytest.raises(httpx.ReadTimeout):
            http.post(url, content=b"x", timeout=0.3)
        assert http.post(url, content=b"x").content == b"third"


def test_a_refusal_is_read_although_the_server_does_not_read_the_whole_request() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlong")
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.1)  # as nginx's lingering close, but shorter than the client's sending

    with serving(refuse) as url, client() as http:
        response = http.post(url, content=bytes(2**25))
        assert (response.status_code, response.content) == (413, b"long")


def test_a_server_that_does_not_read_the_request_times_out() -> None:
    def hang(connection: socket.socket) -> None:
        while connection.recv(1):
            time.sleep(0.05)

    with serving(hang) as url, client() as http, pytest.raises(httpx.ReadTimeout):
        http.post(url, content=bytes(2**25), timeout=0.5)


def test_an_answer_in_slow_chunks_times_out() -> None:
    def trickle(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1\r\nx\r\n")
            time.sleep(0.05)

    with serving(trickle) as url, client() as http, pytest.raises(httpx.ReadTimeout):
        http.post(url, content=b"x", timeout=0.5)
