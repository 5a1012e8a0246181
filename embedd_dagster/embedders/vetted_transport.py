"""How httpx reaches a provider: only at addresses that are allowed, and cheaply.

Over the standard library's HTTP client, because httpx's own (h11 takes an answer apart in pieces of 64 KB) cost 0.8 ms of
CPU a request of 256 texts, a tenth of all that a row costs; this costs 0.4.
"""

from __future__ import annotations

import http.client
import io
import select
import socket
import ssl
import threading
import time
from functools import partial
from typing import Any, Final, NamedTuple

import httpx

from embedd_dagster import network
from embedd_dagster.errors import EmbeddingRejected
from embedd_dagster.network import AddressForbidden, NameUnknown, Resolver

LARGEST_ANSWER: Final = 64 * 2**20
"""Twice what 2,048 vectors of 3,072 numbers take as base64."""
ANSWER_TO_ONE_TEXT: Final = 2**20
"""Of a server that gives no vector of more than 16,000 numbers, however it writes them."""
_PIECE: Final = 2**20


class _SocketUntil(io.RawIOBase):
    """A socket to read from until an instant: a timeout of its own counts anew for every byte that comes."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


class _Answer(http.client.HTTPResponse):
    """An answer that has come whole by an instant, and is of a bounded size."""

    def __init__(self, sock: socket.socket, *arguments: Any, until: float, largest: int, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self._largest = largest
        self.fp.close()
        self.fp = io.BufferedReader(_SocketUntil(sock, until), 2**16)

    def read_all(self) -> bytes:
        """The body. Raises HTTPException where it is too large, or ends too early."""
        pieces, size = [], 0
        while piece := self.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > self._largest:
                raise http.client.HTTPException("too large")
        if self.length:
            raise http.client.IncompleteRead(b"", self.length)
        return b"".join(pieces)


class _Idle(NamedTuple):
    connection: http.client.HTTPConnection
    since: float


class VettedTransport(httpx.BaseTransport):
    """Connects only to addresses that are allowed, found and checked anew for every connection.

    The address that was checked is the one that is connected to, so a name cannot lead elsewhere in between; Host header
    and TLS name stay those of the URL. For one origin; as many connections are open as there are threads at work, and
    those that `limits` allow are kept.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None,
        limits: httpx.Limits,
        deny_private_networks: bool,
        largest_answer: int = LARGEST_ANSWER,
        resolver: Resolver = network.resolve,
    ) -> None:
        self._largest_answer = largest_answer
        self._tls = tls
        self._limits = limits
        self._deny_private_networks = deny_private_networks
        self._resolver = resolver
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer, read to its end. Raises httpx's own errors, and EmbeddingRejected for a forbidden address."""
        timeout = request.extensions["timeout"]
        connection = self._take() or self._connect(request.url, timeout["connect"])
        try:
            connection.sock.settimeout(timeout["read"])
            until = time.monotonic() + timeout["read"]
            connection.response_class = partial(_Answer, until=until, largest=self._largest_answer)  # type: ignore[assignment]
            connection.putrequest(
                request.method, request.url.raw_path.decode("ascii"), skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.raw:
                connection.putheader(name.decode("ascii"), value)
            connection.endheaders(request.read())
            answer: Any = connection.getresponse()
            response = httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read_all())
        except TimeoutError:
            connection.close()
            raise httpx.ReadTimeout("No answer in time.", request=request) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise httpx.RemoteProtocolError(type(error).__name__, request=request) from None
        except BaseException:
            connection.close()
            raise
        self._give_back(connection)
        return response

    def close(self) -> None:
        """Idle connections are closed."""
        with self._lock:
            idle, self._idle = self._idle, []
        for item in idle:
            item.connection.close()

    def _take(self) -> http.client.HTTPConnection | None:
        expiry = self._limits.keepalive_expiry
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection, since = self._idle.pop()
            # what can be read of an idle connection is its end
            poller = select.poll()
            poller.register(connection.sock, select.POLLIN)
            if not poller.poll(0) and (expiry is None or time.monotonic() - since < expiry):
                return connection
            connection.close()

    def _give_back(self, connection: http.client.HTTPConnection) -> None:
        kept = self._limits.max_keepalive_connections
        with self._lock:
            # the standard library has closed it already where the server wanted that
            if connection.sock is not None and (kept is None or len(self._idle) < kept):
                self._idle.append(_Idle(connection, time.monotonic()))
                return
        connection.close()

    def _connect(self, url: httpx.URL, timeout: float | None) -> http.client.HTTPConnection:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            addresses = network.vetted_addresses(
                url.host, port, deny_private_networks=self._deny_private_networks, resolver=self._resolver
            )
        except NameUnknown:
            raise httpx.ConnectError("The name does not resolve.") from None
        except AddressForbidden as error:
            raise forbidden_host(url.host, str(error)) from None
        failure: httpx.TransportError = httpx.ConnectError("The name has no address.")
        for address in addresses:
            connection = http.client.HTTPConnection(url.host, port)
            connection.auto_open = 0  # it would look up the name by itself
            try:
                connection.sock = socket.create_connection((address, port), timeout)
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    connection.sock = self._tls.wrap_socket(connection.sock, server_hostname=url.host)
            except TimeoutError:
                failure = httpx.ConnectTimeout("No connection in time.")
            except OSError as error:
                failure = httpx.ConnectError(type(error).__name__)
            else:
                return connection
            connection.close()
        raise failure


def forbidden_host(host: str, reason: str) -> EmbeddingRejected:
    """What to say of a host name that leads to such an address."""
    return EmbeddingRejected(
        f"The embedding provider's host {host!r} leads to {reason}, to which this service does not connect.",
        resolution="Use a base_url that is reachable under a public address, or ask the operator of this service.",
    )
