"""Where an embedding provider's base_url may lead, checked at every connection."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from embedd_dagster.connectors.http.transport import VettedTransport
from embedd_dagster.connectors.network import NameUnknown
from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.errors import EmbeddingRejected, EmbeddingUnavailable
from tests.support.openai_server import RunningServer, running_openai_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


class Names:
    """A name server that gives these answers in turn, and the last one from then on."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def client(names: Names, *, deny: bool = False, keep: int = 1) -> httpx.Client:
    limits = httpx.Limits(max_connections=2, max_keepalive_connections=keep)
    return httpx.Client(
        transport=VettedTransport(tls=None, limits=limits, deny_private_networks=deny, resolver=names),
        trust_env=False,
    )


def test_connects_to_the_checked_address_with_the_given_host_name(server: RunningServer) -> None:
    names = Names(["127.0.0.1"])
    port = httpx.URL(server.url).port
    with client(names) as http:
        response = http.get(f"http://provider.example:{port}/_stats")
        assert response.status_code == 200
        assert response.request.headers["host"] == f"provider.example:{port}"
        http.get(f"http://provider.example:{port}/_stats")
    assert names.asked == [("provider.example", port)]  # once a connection


def test_a_name_that_resolves_to_a_forbidden_address_later_is_refused(server: RunningServer) -> None:
    names = Names(["127.0.0.1"], ["169.254.169.254"])
    url = f"http://provider.example:{httpx.URL(server.url).port}/_stats"
    with client(names, keep=0) as http:
        assert http.get(url).status_code == 200
        with pytest.raises(EmbeddingRejected, match="metadata service"):
            http.get(url)


def test_a_name_that_becomes_private_after_validation_is_refused(server: RunningServer) -> None:
    names = Names(["8.8.8.8"], ["127.0.0.1"])
    assert names("provider.example", 80) == ["8.8.8.8"]
    with client(names, deny=True) as http, pytest.raises(EmbeddingRejected, match="a private address"):
        http.get(f"http://provider.example:{httpx.URL(server.url).port}/_stats")


@contextmanager
def _answering(send: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that sends one answer, byte by byte as given."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _address = listener.accept()
            with connection, suppress(OSError):
                connection.recv(65536)
                send(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(10)


def _trickle(head: bytes) -> Callable[[socket.socket], object]:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            time.sleep(0.1)

    return send


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Header: ", b"HTTP/1.1 200 OK\r\n\r\n"])
@pytest.mark.timeout(30)
def test_an_answer_that_arrives_byte_by_byte_times_out(head: bytes) -> None:
    with (
        _answering(_trickle(head)) as url,
        client(Names(["127.0.0.1"])) as http,
        pytest.raises((httpx.ReadTimeout, httpx.RemoteProtocolError)),
    ):
        http.get(url, timeout=0.5)


@pytest.mark.timeout(30)
def test_an_endless_answer_is_stopped_at_the_size_limit() -> None:
    def send(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")

    with (
        _answering(send) as url,
        client(Names(["127.0.0.1"])) as http,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        http.get(url, timeout=20)


def test_a_truncated_answer_is_an_error() -> None:
    def send(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")

    with (
        _answering(send) as url,
        client(Names(["127.0.0.1"])) as http,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        http.get(url)


def test_one_forbidden_address_among_others_refuses_the_name() -> None:
    with client(Names(["127.0.0.1", "fe80::1%lo"])) as http, pytest.raises(EmbeddingRejected, match="link-local"):
        http.get("http://provider.example:1/")


def test_the_next_address_is_tried_if_one_does_not_answer(server: RunningServer) -> None:
    with client(Names(["127.0.0.2", "127.0.0.1"])) as http:
        assert http.get(f"http://provider.example:{httpx.URL(server.url).port}/_stats").status_code == 200


def test_a_name_that_does_not_resolve_is_a_connection_error() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise NameUnknown("no such name")

    transport = VettedTransport(tls=None, limits=httpx.Limits(), deny_private_networks=False, resolver=unknown)
    with httpx.Client(transport=transport) as http, pytest.raises(httpx.ConnectError):
        http.get("http://provider.example/")


class _Closing(BaseHTTPRequestHandler):
    """Answers, and closes the connection without announcing it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
        self.close_connection = True

    def log_message(self, *_args: object) -> None:
        pass


class _ClosingServer(ThreadingHTTPServer):
    """Reports when a connection is closed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Closing)
        self.closed = threading.Semaphore(0)

    def process_request_thread(self, *arguments: Any) -> None:
        super().process_request_thread(*arguments)
        self.closed.release()


@pytest.fixture
def closing_server() -> Iterator[_ClosingServer]:
    with _ClosingServer() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_kept_connection_that_the_server_closed_is_not_used_again(closing_server: _ClosingServer) -> None:
    names = Names(["127.0.0.1"])
    with client(names) as http:
        for _ in range(3):
            assert http.get(f"http://provider.example:{closing_server.server_port}/").text == "ok"
            assert closing_server.closed.acquire(timeout=10)
    assert len(names.asked) == 3


def test_a_certificate_is_checked_for_the_given_host_name(closing_server: ThreadingHTTPServer, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "provider.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("provider.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(pem)
    closing_server.socket = server_side.wrap_socket(closing_server.socket, server_side=True)
    trusting = ssl.create_default_context(cadata=certificate.public_bytes(serialization.Encoding.PEM).decode())
    transport = VettedTransport(
        tls=trusting, limits=httpx.Limits(), deny_private_networks=False, resolver=Names(["127.0.0.1"])
    )
    with httpx.Client(transport=transport) as http:
        assert http.get(f"https://provider.example:{closing_server.server_port}/").text == "ok"
        with pytest.raises(httpx.ConnectError):
            http.get(f"https://other.example:{closing_server.server_port}/")


@pytest.mark.parametrize(
    ("provider", "model", "dimensions"),
    [
        ("openai", "text-embedding-3-small", 1536),
        ("gemini", "gemini-embedding-001", 3072),
        ("voyage", "voyage-3.5", 1024),
    ],
)
def test_the_address_of_every_provider_is_checked(
    server: RunningServer, provider: str, model: str, dimensions: int
) -> None:
    for base_url, deny in (("http://169.254.169.254/v1", False), (server.base_url, True)):
        credentials = {"api_key": "key", "base_url": base_url}
        with (
            open_embedder(
                provider, credentials=credentials, model=model, dimensions=dimensions, deny_private_networks=deny
            ) as embedder,
            pytest.raises(EmbeddingRejected, match="does not connect"),
        ):
            embedder.embed_documents(["a"])


def test_a_forbidden_address_is_not_passed_to_the_operators_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    credentials = {"api_key": "key", "base_url": "http://169.254.169.254/v1"}
    with pytest.raises(EmbeddingRejected, match="metadata service"):
        open_embedder("openai", credentials=credentials, model="m", dimensions=8)
    credentials["base_url"] = "http://provider.example/v1"
    with (
        open_embedder("openai", credentials=credentials, model="m", dimensions=8) as embedder,
        pytest.raises(EmbeddingUnavailable, match="ConnectError"),
    ):
        embedder.embed_documents(["a"])


@pytest.mark.timeout(60)
def test_an_answer_through_a_proxy_has_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")

    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    credentials = {"api_key": "key", "base_url": "http://provider.example/v1"}
    for send, problem in ((without_end, "RemoteProtocolError"), (_trickle(b"HTTP/1.1 200 OK\r\n\r\n"), "within 1 s")):
        with _answering(send) as proxy:
            monkeypatch.setenv("http_proxy", proxy)
            embedder = OpenAIEmbedder(
                model="m", dimensions=8, timeout_seconds=1 if "1 s" in problem else 60, **credentials
            )
            with embedder, pytest.raises(EmbeddingUnavailable, match=problem):
                embedder.embed_documents(["a"])
