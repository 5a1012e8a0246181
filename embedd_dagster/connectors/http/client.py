"""The HTTP client of one embedder: its requests reach the provider as they are, and no other address."""

from __future__ import annotations

import ipaddress
import ssl
import urllib.request
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import httpx

from embedd_dagster.connectors import network
from embedd_dagster.connectors.http.transport import VettedTransport, forbidden_host

_CONNECT_TIMEOUT_SECONDS: Final = 10.0


class ProviderClient(httpx.Client):
    """An httpx client for one origin, without redirects, cookies, retries and settings of the process' environment.

    Requests carry the headers given here and no others, so an SDK on top of it cannot add its own. The operator's proxy is
    used if the environment names one.
    """

    def __init__(
        self,
        url: httpx.URL,
        *,
        headers: Mapping[str, str],
        connections: int,
        timeout_seconds: float,
        deny_private_networks: bool,
        largest_answer: int,
    ) -> None:
        """Raises EmbeddingRejected for a forbidden address that a proxy would have to connect to."""
        proxy = _proxy_for(url)
        if proxy:
            # the proxy resolves names, but an address reaches it unchanged
            _check_literal(url.host, deny_private_networks=deny_private_networks)
        self._vetted = VettedTransport(
            tls=_tls_context() if url.scheme == "https" else None,
            limits=httpx.Limits(max_keepalive_connections=connections),
            deny_private_networks=deny_private_networks,
            largest_answer=largest_answer,
            proxy=proxy,
        )
        super().__init__(
            # base64 vectors hardly get smaller by compression, but cost as much again to unpack
            headers={
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": "embedd",
                **headers,
            },
            timeout=httpx.Timeout(timeout_seconds, connect=min(_CONNECT_TIMEOUT_SECONDS, timeout_seconds)),
            trust_env=False,
            transport=self._vetted,
        )

    def build_request(self, method: str, url: httpx.URL | str, **options: Any) -> httpx.Request:
        """A request with this client's headers and timeout; of the options only `content` counts."""
        return httpx.Request(
            method,
            url,
            headers=self.headers,
            content=options.get("content"),
            extensions={"timeout": self.timeout.as_dict()},
        )

    def send(self, request: httpx.Request, **_: Any) -> httpx.Response:
        """The answer, read to its end: one request. Raises as `VettedTransport.handle_request`."""
        return self._vetted.handle_request(request)


def _check_literal(host: str, *, deny_private_networks: bool) -> None:
    try:
        reason = network.refusal(host, deny_private_networks=deny_private_networks)
    except ValueError:
        return  # a name
    if reason:
        raise forbidden_host(host, reason)


def _proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    # a proxy of the environment cannot reach our own loopback
    if _is_loopback(url.host):
        return None
    proxies = urllib.request.getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or urllib.request.proxy_bypass(url.host):
        return None
    address = address if "://" in address else f"http://{address}"
    return httpx.Proxy(address, ssl_context=_tls_context() if address.startswith("https:") else None)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    # reading the certificates takes longer than a query: once for the process
    return httpx.create_ssl_context()
