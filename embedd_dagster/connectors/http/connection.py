"""One HTTP/1.1 connection to a provider, over the standard library's client: the answer is read whole, by a deadline.

The standard library leaves it to the last reader to close a connection that the server ends. Here the connection is
closed by its owner alone, after the answer was read.
"""

from __future__ import annotations

import gzip
import http.client
import io
import select
import socket
import ssl
import time
import zlib
from contextlib import suppress
from typing import Any, Final

import httpx

LARGEST_ANSWER: Final = 64 * 2**20
"""Twice what 2,048 vectors of 3,072 numbers take as base64."""
ANSWER_TO_ONE_TEXT: Final = 2**20
"""Of a server that gives no vector of more than 16,000 numbers, however it writes them."""
_PIECE: Final = 2**20
_READ_BUFFER: Final = 2**16
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_BARE_DEFLATE: Final = -zlib.MAX_WBITS
# what the standard library raises for something that is not an HTTP answer; ValueError for a negative chunk size
NOT_HTTP: Final = (http.client.HTTPException, ValueError, EOFError, zlib.error)


class ConnectionWasClosed(Exception):
    """The server had closed this kept connection before anything of an answer came: another connection may serve."""


class _Incoming(io.RawIOBase):
    """What comes from a socket, until an instant: a timeout of the socket starts again with every byte."""

    def __init__(self, sock: socket.socket, largest: int) -> None:
        self._sock = sock
        self._largest = largest
        self.until: float | None = None
        """None: do not wait, only what has been read already counts."""
        self.received = 0
        """Bytes of the present answer."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.until is None:
            return None
        self._sock.settimeout(_seconds_left(self.until))
        count = self._sock.recv_into(buffer)
        self.received += count
        if self.received > self._largest:
            raise http.client.HTTPException("too large")
        return count


class _Reader(io.BufferedReader):
    """Stays open from one answer to the next, so that bytes after an answer are noticed."""

    def close(self) -> None:
        """Does nothing: http.client closes it at the end of every answer."""


class _Socket:
    """What http.client takes for a socket. Its `close` does nothing, because an answer may still be coming."""

    def __init__(self, sock: socket.socket, largest: int) -> None:
        self._sock = sock
        self.incoming = _Incoming(sock, largest)
        self.reader = _Reader(self.incoming, _READ_BUFFER)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return self.reader

    def sendall(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            self._sock.settimeout(_seconds_left(self.incoming.until or 0))
            rest = rest[self._sock.send(rest) :]

    def close(self) -> None:
        pass


def _seconds_left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Answer(http.client.HTTPResponse):
    """An answer after those that only announce it."""

    def begin(self) -> None:
        super().begin()
        # such as 103 Early Hints: the standard library skips 100 only
        while self.status < 200 and self.status != 101:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()

    def read_all(self, largest: int) -> bytes:
        """The body, unpacked, of at most `largest` bytes. Raises one of `NOT_HTTP` if it is incomplete or cannot be unpacked."""
        pieces = []
        while piece := self.read(_PIECE):
            pieces.append(piece)
        if self.length:
            raise http.client.IncompleteRead(b"", self.length)
        return _unpack(b"".join(pieces), self.headers.get("content-encoding", ""), largest)


class ProviderConnection:
    """A connection that is open. Its owner closes it, also after an error."""

    def __init__(self, sock: socket.socket, host: str, port: int, *, largest_answer: int = LARGEST_ANSWER) -> None:
        self._sock = sock
        self._largest_answer = largest_answer
        self._stream = _Socket(sock, largest_answer)
        self._http = http.client.HTTPConnection(host, port)
        self._http.auto_open = 0  # it would look up the name by itself
        self._http.response_class = _Answer
        self._http.sock = self._stream
        self._is_used = False

    def exchange(self, request: httpx.Request, until: float) -> httpx.Response:
        """The answer to a request, read to its end.

        Raises TimeoutError if it has not come by `until`, OSError, one of `NOT_HTTP`, and ConnectionWasClosed.
        """
        incoming = self._stream.incoming
        is_reused, self._is_used = self._is_used, True
        incoming.until, incoming.received = until, 0
        try:
            self._send(request)
            answer: Any = self._http.getresponse()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # http.client.RemoteDisconnected is a ConnectionError too
            if is_reused and not incoming.received:
                raise ConnectionWasClosed from None
            raise
        content = answer.read_all(self._largest_answer)
        incoming.until = None
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() != "content-encoding"]
        return httpx.Response(answer.status, headers=headers, content=content)

    def _send(self, request: httpx.Request) -> None:
        target = request.url.raw_path.decode("ascii")
        self._http.putrequest(request.method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.raw:
            self._http.putheader(name.decode("ascii"), value)
        # a server that refuses the request may answer, and close, before it has read all of it
        with suppress(BrokenPipeError, ConnectionResetError):
            self._http.endheaders(request.read())

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent: the server keeps it open, and nothing has come unasked."""
        if self._http.sock is None or self._stream.reader.peek(1):
            return False
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return False
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        # what can be read of an idle connection is its end, or no answer to anything
        return not poller.poll(0)

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._http.close()
        self._sock.close()


def _unpack(body: bytes, encoding: str, largest: int) -> bytes:
    """The body without its compression: some servers compress although they were asked not to."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding in _GZIP:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(body)).read(largest + 1)
    elif encoding == "deflate":
        unpacked = _inflate(body, largest)
    else:
        raise http.client.HTTPException("an unknown compression")
    if len(unpacked) > largest:
        raise http.client.HTTPException("too large")
    return unpacked


def _inflate(body: bytes, largest: int) -> bytes:
    # "deflate" means zlib's form; some servers send the bare one
    try:
        return zlib.decompressobj().decompress(body, largest + 1)
    except zlib.error:
        return zlib.decompressobj(_BARE_DEFLATE).decompress(body, largest + 1)
