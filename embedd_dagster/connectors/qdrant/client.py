"""Qdrant's REST interface through `qdrant_client`'s transport and models.

Added to the transport: answers are not compressed, idle connections expire before the server closes them, a call that loses
its connection is repeated once, and failures become our errors. Bodies are `qdrant_client`'s models, or bytes where a call is
made often: its models cost three times as much CPU (ADR 0020). Answers are read as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

import httpx
import orjson
from pydantic import BaseModel
from qdrant_client.http.api_client import ApiClient

from embedd_dagster.connectors.qdrant.failures import no_answer, refusal, unreachable
from embedd_dagster.errors import ConfigurationError, VectorStoreRejected

_CONNECT_SECONDS: Final = 5.0
_MAX_CONNECTIONS: Final = 64
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_KEEPALIVE_SECONDS: Final = 2.0
"""Qdrant closes a connection that was idle for 5 s; a call that meets the closing would fail."""
_CONNECTION_LOST: Final = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)

READ_SECONDS: Final = 30.0
WRITE_SECONDS: Final = 120.0
SLOW_SECONDS: Final = 600.0
"""For what may take as long as there are points: payload indexes, exact counts."""


class _Transport(ApiClient):
    """`qdrant_client`'s transport, without its reading of answers, and with one repeat when the connection is lost."""

    def send(self, request: httpx.Request, type_: Any) -> Any:  # noqa: ARG002 - what answers are read as
        try:
            return self._client.send(request)
        except _CONNECTION_LOST:
            return self._client.send(request)


class QdrantRest:
    """Calls to one Qdrant. Safe to use from several threads; nothing is connected to before the first call."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        transport: httpx.BaseTransport | None = None,
        *,
        read_timeout_seconds: float = READ_SECONDS,
    ) -> None:
        self._read_timeout_seconds = read_timeout_seconds
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigurationError(f"EMBEDD_QDRANT_URL is not a URL: {error}.") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigurationError("EMBEDD_QDRANT_URL must be of the form http://host:6333.")
        self.host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        self.is_encrypted = parsed.scheme == "https"
        # a developer's proxy does not know the way to this machine
        self.uses_proxy = parsed.host not in _LOOPBACK
        self.address = f"{parsed.host}:{parsed.port or (443 if self.is_encrypted else 80)}"
        self.api_key = check_api_key(api_key)
        self._transport = _Transport(
            str(parsed),
            # identity: Qdrant compresses in chunks, and the last one waits 40 ms for a delayed ACK
            headers={"content-type": "application/json", "accept-encoding": "identity"}
            | ({"api-key": self.api_key} if self.api_key else {}),
            limits=httpx.Limits(
                max_connections=_MAX_CONNECTIONS,
                max_keepalive_connections=_MAX_CONNECTIONS,
                keepalive_expiry=_KEEPALIVE_SECONDS,
            ),
            transport=transport,
            trust_env=self.uses_proxy,
        )

    def call(
        self, method: str, path: Sequence[str], body: Any = None, *, seconds: float | None = None, wait: bool = False
    ) -> Any:
        """The `result` of a call. `path` is quoted part by part; `body` is a model, or JSON, or bytes of JSON.

        Every call is idempotent: if the connection is lost it is sent once more.

        Raises:
            VectorStoreUnavailable: No answer in time, 5xx, or 429 with its `retry_after_seconds`.
            SetMissing: 404.
            LimitExceeded: Strict mode refuses the call (400, before 1.13 403), or 429 for one that would never be allowed.
            VectorStoreRejected: Any other 4xx.
        """
        answer = self._send(method, path, body, seconds=seconds, wait=wait)
        if not answer.is_success:
            raise refusal(
                self.address,
                answer.status_code,
                _reason(answer),
                has_key=self.api_key is not None,
                retry_after_seconds=_retry_after(answer),
            )
        try:
            return orjson.loads(answer.content)["result"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise VectorStoreRejected(
                f"What answers at {self.address} does not speak Qdrant's protocol.",
                resolution="Check EMBEDD_QDRANT_URL: it is the address of Qdrant's REST interface, usually port 6333.",
            ) from None

    def version(self) -> tuple[int, ...] | None:
        """The server's version, such as (1, 17, 1); None if it does not say. Raises as `call` does."""
        answer = self._send("GET", (), None)
        try:
            written = str(orjson.loads(answer.content)["version"])
            return tuple(int(part) for part in written.partition("-")[0].split("."))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return None

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        self._transport.close()

    def _send(
        self, method: str, path: Sequence[str], body: Any, *, seconds: float | None = None, wait: bool = False
    ) -> httpx.Response:
        seconds = self._read_timeout_seconds if seconds is None else seconds
        try:
            answer = self._transport.request(
                type_=httpx.Response,
                method=method,
                url="/".join(quote(part, safe="") for part in path),
                content=_content(body),
                params={"wait": "true"} if wait else {},
                timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            )
        except httpx.TimeoutException:
            raise no_answer(self.address) from None
        except httpx.HTTPError as error:
            raise unreachable(self.address, type(error).__name__) from None
        # httpx lets it refer to itself, and to what was sent: megabytes that would wait for the garbage collector
        answer.stream = httpx.ByteStream(b"")
        return answer


def _content(body: Any) -> bytes | None:
    if isinstance(body, BaseModel):
        return body.model_dump_json(exclude_none=True, by_alias=True).encode()
    return body if body is None or isinstance(body, bytes) else orjson.dumps(body)


def check_api_key(api_key: str | None) -> str | None:
    """The key as it is sent, without blanks around it. Raises ConfigurationError for one that cannot be a key."""
    key = (api_key or "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ConfigurationError(
            "EMBEDD_QDRANT_API_KEY contains characters that are not valid in an API key.",
            resolution="Set it again, without line breaks and blanks: a key is printable ASCII.",
        )
    return key or None


def _reason(answer: httpx.Response) -> str:
    try:
        return str(orjson.loads(answer.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.reason_phrase


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
