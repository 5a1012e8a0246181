"""How httpx reaches a provider: only at addresses that are allowed, and cheaply.

Over the standard library's HTTP client, because httpx's own (h11 takes an answer apart in pieces of 64 KB) cost 0.8 ms of
CPU a request of 256 texts, a tenth of all that a row costs; this costs 0.4.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import NamedTuple

import httpx

from embedd_dagster.connectors import network
from embedd_dagster.connectors.http.connection import LARGEST_ANSWER, NOT_HTTP, ConnectionWasClosed, ProviderConnection
from embedd_dagster.connectors.network import AddressForbidden, NameUnknown, Resolver
from embedd_dagster.errors import EmbeddingRejected


class _Idle(NamedTuple):
    connection: ProviderConnection
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
        """The answer, read to its end. Raises httpx's own errors, and EmbeddingRejected for a forbidden address.

        A server may close a kept connection at any time. If it did so before it answered anything, the request is sent
        once more, over a new connection.
        """
        timeout = request.extensions["timeout"]
        if kept := self._take():
            until = time.monotonic() + timeout["read"]
            try:
                return self._exchange(kept, request, until)
            except ConnectionWasClosed:
                pass
        connection = self._connect(request.url, timeout["connect"])
        return self._exchange(connection, request, until if kept else time.monotonic() + timeout["read"])

    def _exchange(self, connection: ProviderConnection, request: httpx.Request, until: float) -> httpx.Response:
        try:
            response = connection.exchange(request, until)
        except TimeoutError:
            connection.close()
            raise httpx.ReadTimeout("No answer in time.", request=request) from None
        except (OSError, *NOT_HTTP) as error:
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

    def _take(self) -> ProviderConnection | None:
        expiry = self._limits.keepalive_expiry
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection, since = self._idle.pop()
            if connection.is_reusable and (expiry is None or time.monotonic() - since < expiry):
                return connection
            connection.close()

    def _give_back(self, connection: ProviderConnection) -> None:
        kept = self._limits.max_keepalive_connections
        if connection.is_reusable:
            with self._lock:
                if kept is None or len(self._idle) < kept:
                    self._idle.append(_Idle(connection, time.monotonic()))
                    return
        connection.close()

    def _connect(self, url: httpx.URL, timeout: float | None) -> ProviderConnection:
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
            try:
                opened = self._open_socket(address, url.host, port, timeout)
                return ProviderConnection(opened, url.host, port, largest_answer=self._largest_answer)
            except TimeoutError:
                failure = httpx.ConnectTimeout("No connection in time.")
            except OSError as error:
                failure = httpx.ConnectError(type(error).__name__)
        raise failure

    def _open_socket(self, address: str, host: str, port: int, timeout: float | None) -> socket.socket:
        sock = socket.create_connection((address, port), timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._tls.wrap_socket(sock, server_hostname=host) if self._tls else sock
        except BaseException:
            sock.close()
            raise


def forbidden_host(host: str, reason: str) -> EmbeddingRejected:
    """What to say of a host name that leads to such an address."""
    return EmbeddingRejected(
        f"The embedding provider's host {host!r} leads to {reason}, to which this service does not connect.",
        resolution="Use a base_url that is reachable under a public address, or ask the operator of this service.",
    )
