"""A server whose every byte a test chooses: it serves one connection after the other."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

OK = b"HTTP/1.1 200 OK\r\n"
Serve = Callable[[socket.socket], object]


@contextmanager
def serving(*connections: Serve) -> Iterator[str]:
    """A server that serves one connection after the other, each in the way given."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for serve_one in connections:
                connection, _address = listener.accept()
                with connection, suppress(OSError):
                    serve_one(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(10)


def read_request(connection: socket.socket) -> bytes:
    """A request of any length; b"" when the client has closed the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (piece := connection.recv(65536)):
            return b""
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head


def answering(*answers: bytes) -> Serve:
    """One answer for each request, then the connection is closed."""

    def serve(connection: socket.socket) -> None:
        for answer in answers:
            read_request(connection)
            connection.sendall(answer)

    return serve


def fixed(body: bytes, *headers: bytes) -> bytes:
    return OK + b"".join(header + b"\r\n" for header in (*headers, b"Content-Length: %d" % len(body))) + b"\r\n" + body
