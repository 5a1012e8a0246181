"""How the providers behind an HTTP API are reached: their address vetted at every connection, their faults translated."""

from __future__ import annotations

import ipaddress
import ssl
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, Unpack

import httpx
import orjson

from embedd_dagster.connectors import network
from embedd_dagster.connectors.http.base_url import UnusableUrl, parse_base_url, with_path
from embedd_dagster.connectors.http.transport import LARGEST_ANSWER
from embedd_dagster.connectors.http.rejections import FieldRefused, refusal
from embedd_dagster.connectors.http.transport import VettedTransport, forbidden_host
from embedd_dagster.errors import EmbeddingRejected, EmbeddingUnavailable, TextRejected
from embedd_dagster.protocols.cutting import byte_count, cut_at_bytes, cut_at_unknown_tokens
from embedd_dagster.protocols.embedder import CutText
from embedd_dagster.protocols.suspicion import PROBE_TEXT, Failure

_CONNECT_TIMEOUT_SECONDS = 10.0
_DEFAULT_CONCURRENCY = 16
_OF_THE_TRANSFER = frozenset({"content-encoding", "content-length", "transfer-encoding"})


class HttpOptions(TypedDict):
    """How a provider is reached: what its embedder hands on as it is."""

    api_key: str | None
    base_url: str | None
    concurrency: NotRequired[int | None]
    timeout_seconds: NotRequired[float]
    deny_private_networks: NotRequired[bool]
    max_input_tokens: NotRequired[int | None]
    largest_answer: NotRequired[int]


@dataclass(frozen=True, slots=True)
class Request:
    """How a provider is asked: which fields, and which of them a server may do without."""

    url: httpx.URL
    options: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]]
    """The whole body for these options and texts."""
    required: frozenset[str]
    dimensions_field: str
    may_omit_dimensions: bool
    """Whether the model may give the wanted dimensions by itself."""


class HttpEmbedder:
    """What the embedders behind an HTTP API share: one pool of connections, one way to ask. Redirects are not followed."""

    def __init__(
        self,
        *,
        provider: str,
        model: str,
        dimensions: int,
        default_base_url: str,
        **options: Unpack[HttpOptions],
    ) -> None:
        base_url, timeout_seconds = options["base_url"], options.get("timeout_seconds", 60.0)
        deny_private_networks = options.get("deny_private_networks", False)
        self._largest_answer = options.get("largest_answer", LARGEST_ANSWER)
        self._model = model
        self._dimensions = dimensions
        self._timeout_seconds = timeout_seconds
        self._left_out = frozenset[str]()
        self._max_input_tokens = options.get("max_input_tokens")
        self._concurrency = concurrency = options.get("concurrency") or _DEFAULT_CONCURRENCY
        url = _parse_base_url(base_url or default_base_url, example=default_base_url)
        self._name = f"The embedding provider at {url.host}" if base_url else provider
        self._base_url = url
        tls = _tls_context() if url.scheme == "https" else None
        pool = httpx.Limits(max_connections=concurrency + 2, max_keepalive_connections=concurrency + 2)
        is_proxied = _is_proxied(url)
        if is_proxied:
            # the operator's proxy decides where it connects to, and resolves the names; an address it is given as it is
            _check_literal(url.host, deny_private_networks=deny_private_networks)
        transport = (
            None
            if is_proxied
            else VettedTransport(
                tls=tls,
                limits=pool,
                deny_private_networks=deny_private_networks,
                largest_answer=self._largest_answer,
            )
        )
        self._http = httpx.Client(
            # vectors as base64 hardly get smaller by compression, but cost as much again to unpack
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "embedd"},
            timeout=httpx.Timeout(timeout_seconds, connect=min(_CONNECT_TIMEOUT_SECONDS, timeout_seconds)),
            limits=pool,
            verify=tls or False,
            trust_env=is_proxied,
            follow_redirects=False,
            transport=transport,
        )
        # past the client's redirects, cookies and hooks where there are none: 0.2 ms a request
        self._send = transport.handle_request if transport else self._send_through_proxy

    def close(self) -> None:
        """Gives connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send_through_proxy(self, request: httpx.Request) -> httpx.Response:
        """The answer, read to its end; bounded in size and time, as the vetted transport's."""
        until, content = time.monotonic() + self._timeout_seconds, bytearray()
        with closing(self._http.send(request, stream=True)) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > self._largest_answer:
                    raise httpx.RemoteProtocolError("too large", request=request)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("No answer in time.", request=request)
        headers = {name: value for name, value in response.headers.items() if name not in _OF_THE_TRANSFER}
        return httpx.Response(response.status_code, headers=headers, content=bytes(content))

    def _endpoint(self, path: str) -> httpx.URL:
        return with_path(self._base_url, path)

    def _ask(self, url: httpx.URL, fields: Mapping[str, Any], texts: Sequence[str], optional: Collection[str]) -> bytes:
        """The body of the answer 200. Raises as `Embedder` says, and FieldRefused for one of the fields in `optional`."""
        try:
            body = orjson.dumps(fields)
        except TypeError:
            raise TextRejected("The text is not valid Unicode.") from None
        try:
            response = self._send(self._http.build_request("POST", url, content=body))
        except httpx.TimeoutException:
            raise EmbeddingUnavailable(
                f"{self._name} did not answer within {self._timeout_seconds:g} s.", failure=Failure.TIMEOUT
            ) from None
        except httpx.RequestError as error:
            raise EmbeddingUnavailable(f"{self._name} cannot be reached ({type(error).__name__}).") from None
        if response.status_code != httpx.codes.OK:
            raise refusal(response, provider=self._name, model=self._model, texts=texts, optional=optional)
        content = response.content
        # httpx lets it refer to itself: half a megabyte would wait for the garbage collector, which comes seldom in a load
        response.stream = httpx.ByteStream(b"")
        return content

    def _ask_leaving_out(self, request: Request, texts: Sequence[str]) -> bytes:
        """As `_ask`, without the optional fields that the server does not take: they are left out from then on."""
        left_out = self._left_out
        while True:
            try:
                content = self._ask_for(request, texts, left_out)
            except FieldRefused as refused:
                if refused.field == request.dimensions_field and not request.may_omit_dimensions:
                    self._check_blame(refused, lambda: self._ask_for(request, [PROBE_TEXT], self._left_out))
                    raise self._wrong_dimensions(None) from None
                left_out |= {refused.field}
            else:
                self._left_out = left_out
                return content

    def _ask_for(self, request: Request, texts: Sequence[str], left_out: frozenset[str]) -> bytes:
        options = {name: value for name, value in request.options.items() if name not in left_out}
        return self._ask(request.url, request.build(options, texts), texts, options.keys() - request.required)

    def _check_blame(self, refused: FieldRefused, probe: Callable[[], object]) -> None:
        """Raises TextRejected if the server takes the field that it seemed to refuse when the text is a harmless one."""
        if refused.is_certain:
            return
        try:
            probe()
        except (FieldRefused, TextRejected):
            return
        raise refused.rejection

    def _max_tokens_per_text(self, known: int | None, unknown_max_bytes: int) -> int:
        """What one text may hold: the model's limit (for an unknown model in bytes), or the lower one that is configured."""
        if self._max_input_tokens is None:
            return unknown_max_bytes if known is None else known
        return self._max_input_tokens if known is None else min(known, self._max_input_tokens)

    def _cut_without_tokenizer(self, text: str, limit: int) -> CutText:
        """The text cut by bytes, which are never fewer than tokens; at a configured limit by an estimate of the tokens."""
        if self._max_input_tokens is None:
            return cut_at_bytes(text, limit)
        return cut_at_unknown_tokens(text, limit)

    def _not_an_answer(self, text_count: int) -> EmbeddingUnavailable:
        # nothing of the cause: it may quote the answer
        return EmbeddingUnavailable(
            f"{self._name} gave an answer that is not one of the embeddings protocol, for {text_count} texts.",
            resolution="It is tried again. If it goes on, check that the provider's base_url is that of its API.",
            failure=Failure.NONSENSE,
        )

    def _wrong_dimensions(self, given: int | None) -> EmbeddingRejected:
        if given is None:
            message = f"{self._name} does not let model {self._model!r} be asked for {self._dimensions} dimensions."
        else:
            message = (
                f"{self._name} gives vectors of {given} dimensions for model {self._model!r}, "
                f"where {self._dimensions} are configured."
            )
        return EmbeddingRejected(
            message,
            resolution="Set the vector table's embedding_dimensions to what the model gives, or change the model.",
            failure=Failure.REFUSED,
        )


def estimate_tokens(texts: Sequence[str]) -> int:
    """What these texts count for where the answer does not say."""
    return sum(map(byte_count, texts)) // 4


def check_key(api_key: str | None, *, provider: str, required: bool) -> str:
    """The key as it is sent, "" for none. Raises EmbeddingRejected for one that cannot be right."""
    key = (api_key or "").strip()
    if not key and required:
        raise EmbeddingRejected(
            f"The embedding provider has no api_key, and {provider} asks for one.",
            resolution="Set credentials.api_key of the embedding provider.",
        )
    if not (key.isascii() and key.isprintable()):
        raise EmbeddingRejected(
            "The embedding provider's api_key holds characters that no key has.",
            resolution="Enter credentials.api_key of the embedding provider again.",
        )
    return key


def _check_literal(host: str, *, deny_private_networks: bool) -> None:
    try:
        reason = network.refusal(host, deny_private_networks=deny_private_networks)
    except ValueError:
        return  # a name
    if reason:
        raise forbidden_host(host, reason)


def _is_proxied(url: httpx.URL) -> bool:
    # a proxy of the environment cannot reach our own loopback
    if _is_loopback(url.host):
        return False
    proxies = urllib.request.getproxies()
    return (url.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(url.host)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_base_url(base_url: str, *, example: str) -> httpx.URL:
    try:
        return parse_base_url(base_url.strip())
    except UnusableUrl as error:
        raise EmbeddingRejected(
            f"The embedding provider's base_url is not a usable http(s) address: {error}.",
            resolution=f"Give it like `{example}`, without what follows in the addresses of its calls.",
        ) from None


@lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    # reading the certificates takes longer than a query: once for the process
    return httpx.create_ssl_context()
