"""How httpx reaches a provider: only at addresses that are allowed, and with a limit on the time and size of an answer.

The HTTP protocol and the pool of connections are httpcore's. What is ours goes through its `network_backend` hook.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import httpcore
import httpx

from embedd_dagster.connectors import network
from embedd_dagster.connectors.http.compression import NotUnpacked, unpack
from embedd_dagster.connectors.network import AddressForbidden, NameUnknown, Resolver
from embedd_dagster.errors import EmbeddingRejected

LARGEST_ANSWER: Final = 64 * 2**20
"""Twice the size of 2,048 vectors of 3,072 numbers as base64."""
ANSWER_TO_ONE_TEXT: Final = 2**20
"""Enough for a vector of 16,000 numbers, in any notation."""
_READ_BYTES: Final = 2**18


class _KeptConnectionClosed(Exception):
    """The server closed this kept connection before it sent any byte of an answer; another connection may work."""


class _Stream(httpcore.NetworkStream):
    """One connection. An exchange is a request and its answer: it begins with the first write after a read.

    httpcore's timeout applies to each call. Here it is the limit of the whole exchange.
    """

    def __init__(self, sock: socket.socket, largest_answer: int) -> None:
        self._sock = sock
        self._largest_answer = largest_answer
        self._exchanges = self._received = 0
        self._until = float("inf")
        self._is_answering = True
        self._held_back = b""

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends all bytes. Raises httpcore's WriteError and ReadTimeout."""
        if self._is_answering:
            self._is_answering = False
            self._exchanges += 1
            self._received = 0
            self._until = float("inf") if timeout is None else time.monotonic() + timeout
        rest = memoryview(buffer)
        try:
            while rest:
                self._limit_time()
                rest = rest[self._sock.send(rest) :]
        except TimeoutError:
            raise httpcore.ReadTimeout("No answer in time.") from None
        except OSError as error:
            raise httpcore.WriteError(type(error).__name__) from None

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - the hook's signature
        """The next bytes, b"" at the end. Raises httpcore's ReadError, ReadTimeout and RemoteProtocolError.

        The last byte that has arrived is given only when it is asked for. At the end of an answer it is still here if
        the server sent more than the answer: then `is_readable` is true, and httpcore does not use the connection again.
        """
        self._is_answering = True
        if self._held_back:
            data, self._held_back = self._held_back, b""
            return data
        data = self._receive()
        if len(data) > 1:
            data, self._held_back = data[:-1], data[-1:]
        return data

    def _receive(self) -> bytes:
        try:
            self._limit_time()
            data = self._sock.recv(_READ_BYTES)
        except TimeoutError:
            raise httpcore.ReadTimeout("No answer in time.") from None
        except OSError as error:
            if isinstance(error, ConnectionError | ssl.SSLEOFError):
                self._check_if_kept()
            raise httpcore.ReadError(type(error).__name__) from None
        if not data:
            self._check_if_kept()
        self._received += len(data)
        if self._received > self._largest_answer:
            raise httpcore.RemoteProtocolError("too large")
        return data

    def _limit_time(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(None if left == float("inf") else left)

    def _check_if_kept(self) -> None:
        if self._exchanges > 1 and not self._received:
            raise _KeptConnectionClosed

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The connection with TLS, for this name. Raises httpcore's ConnectError and ConnectTimeout."""
        try:
            self._sock.settimeout(timeout)
            return _Stream(ssl_context.wrap_socket(self._sock, server_hostname=server_hostname), self._largest_answer)
        except TimeoutError:
            self.close()
            raise httpcore.ConnectTimeout("No connection in time.") from None
        except OSError as error:
            self.close()
            raise httpcore.ConnectError(type(error).__name__) from None

    def get_extra_info(self, info: str) -> Any:
        """The two things that httpcore asks for: `ssl_object`, and `is_readable` of an idle connection."""
        if info == "is_readable":
            return bool(self._held_back) or self._has_input()
        return self._sock if info == "ssl_object" and isinstance(self._sock, ssl.SSLSocket) else None

    def _has_input(self) -> bool:
        if self._sock.fileno() < 0 or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            return True
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._sock.close()


class _Backend(httpcore.NetworkBackend):
    """Connects to the addresses that `addresses_of` gives for a name, never to the name."""

    def __init__(self, addresses_of: Callable[[str, int], list[str]], largest_answer: int) -> None:
        self._addresses_of = addresses_of
        self._largest_answer = largest_answer

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002 - the hook's signature
        socket_options: Iterable[Any] | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """A connection to the first address that answers. Raises httpcore's errors, and EmbeddingRejected."""
        try:
            addresses = self._addresses_of(host, port)
        except NameUnknown:
            raise httpcore.ConnectError("The name does not resolve.") from None
        except AddressForbidden as error:
            raise forbidden_host(host, str(error)) from None
        failure: Exception = httpcore.ConnectError("The name has no address.")
        for address in addresses:
            try:
                sock = socket.create_connection((address, port), timeout)
            except TimeoutError:
                failure = httpcore.ConnectTimeout("No connection in time.")
            except OSError as error:
                failure = httpcore.ConnectError(type(error).__name__)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _Stream(sock, self._largest_answer)
        raise failure


class VettedTransport(httpx.BaseTransport):
    """Connects only to allowed addresses. They are resolved and checked again for every connection.

    The checked address is the one that is connected to, so a name cannot lead elsewhere in between. Host header and TLS
    name stay those of the URL. With `proxy`, the operator's proxy resolves names and decides where it connects to.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None,
        limits: httpx.Limits,
        deny_private_networks: bool,
        largest_answer: int = LARGEST_ANSWER,
        resolver: Resolver = network.resolve,
        proxy: httpx.Proxy | None = None,
    ) -> None:
        self._largest_answer = largest_answer
        vetted = partial(network.vetted_addresses, deny_private_networks=deny_private_networks, resolver=resolver)
        # no limit of connections: each thread at work has one
        options: dict[str, Any] = {
            "ssl_context": tls,
            "max_connections": None,
            "max_keepalive_connections": limits.max_keepalive_connections,
            "keepalive_expiry": limits.keepalive_expiry,
            "network_backend": _Backend(resolver if proxy else vetted, largest_answer),
        }
        self._pool = (
            httpcore.HTTPProxy(
                proxy_url=_core_url(proxy.url),
                proxy_auth=proxy.raw_auth,
                proxy_ssl_context=proxy.ssl_context,
                **options,
            )
            if proxy
            else httpcore.ConnectionPool(**options)
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer, read to its end. Raises httpx's own errors, and EmbeddingRejected for a forbidden address.

        A server may close a kept connection at any time. If it does so before it answers anything, the request is sent
        again over another connection, within the same time limit.
        """
        timeouts = request.extensions["timeout"]
        until = time.monotonic() + timeouts["read"]
        while True:
            try:
                return self._exchange(request, timeouts)
            except _KeptConnectionClosed:
                left = max(0.0, until - time.monotonic())
                timeouts = {**timeouts, "read": left, "write": left}
            except httpcore.ConnectTimeout as error:
                raise httpx.ConnectTimeout(str(error), request=request) from None
            except httpcore.TimeoutException as error:
                raise httpx.ReadTimeout(str(error), request=request) from None
            except httpcore.ConnectError as error:
                raise httpx.ConnectError(str(error), request=request) from None
            except httpcore.ProxyError as error:
                raise httpx.ProxyError(type(error).__name__, request=request) from None
            except (httpcore.NetworkError, httpcore.ProtocolError, NotUnpacked) as error:
                raise httpx.RemoteProtocolError(type(error).__name__, request=request) from None

    def _exchange(self, request: httpx.Request, timeouts: dict[str, float | None]) -> httpx.Response:
        answer = self._pool.request(
            request.method,
            _core_url(request.url),
            headers=request.headers.raw,
            content=request.read(),
            extensions={"timeout": timeouts},
        )
        encoding = b""
        headers = []
        for name, value in answer.headers:
            if name.lower() == b"content-encoding":
                encoding = value
            else:
                headers.append((name, value))
        content = unpack(answer.content, encoding.decode("ascii", "replace"), self._largest_answer)
        return httpx.Response(answer.status, headers=headers, content=content, request=request)

    def close(self) -> None:
        """Closes all connections."""
        self._pool.close()


def _core_url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def forbidden_host(host: str, reason: str) -> EmbeddingRejected:
    """The error for a host name that leads to such an address."""
    return EmbeddingRejected(
        f"The embedding provider's host {host!r} leads to {reason}, to which this service does not connect.",
        resolution="Use a base_url that is reachable under a public address, or ask the operator of this service.",
    )
