"""Qdrant's REST protocol: one pooled HTTP client, one place where its failures become ours.

A dozen calls are made, and the hot ones send bodies of bytes; `qdrant-client` would add half a second and 50 MB to every
process for its models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

import httpx
import orjson

from embedd_dagster.connectors.qdrant.limits import LIMIT_NAMES
from embedd_dagster.errors import ConfigurationError, VectorStoreRejected, VectorStoreUnavailable

_CONNECT_SECONDS: Final = 5.0
_MAX_CONNECTIONS: Final = 64
_MAX_MESSAGE: Final = 300
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_QUOTED: Final = re.compile(r'"([^"]*)"')
_PARAMETERS: Final = frozenset(
    {*LIMIT_NAMES, "limit", "timeout", "hnsw_ef", "exact", "oversampling", "upsert", "wait", "filter", "condition"}
)
"""What stands in quotes in a refusal and helps to understand it. Anything else may be a value of a row."""
_STRICT_MODE: Final = ". Help: "
_OVER_CAPACITY: Final = "try to split"
_RAISE_LIMIT: Final = (
    "Raise the limit in the strict_mode_config of this collection (PATCH /collections/{name}), then try again."
)
_KEEPALIVE_SECONDS: Final = 2.0
"""Qdrant closes a connection that was idle for 5 s; a call that meets the closing would fail."""
_CONNECTION_LOST: Final = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)

READ_SECONDS: Final = 30.0
WRITE_SECONDS: Final = 120.0
SLOW_SECONDS: Final = 600.0
"""For what may take as long as there are points: payload indexes, exact counts."""


class SetMissing(VectorStoreRejected):
    """The collection is not there (any more)."""


class LimitExceeded(VectorStoreRejected):
    """The call is more than the collection's strict mode allows; a smaller one may be allowed."""


class QdrantRest:
    """Calls against one Qdrant. Safe to use from several threads; nothing is connected to before the first call."""

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
            raise ConfigurationError(f"EMBEDD_QDRANT_URL is no URL: {error}.") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigurationError("EMBEDD_QDRANT_URL must be of the form http://host:6333.")
        self.address = f"{parsed.host}:{parsed.port or (443 if parsed.scheme == 'https' else 80)}"
        api_key = check_api_key(api_key)
        self._client = httpx.Client(
            base_url=parsed,
            # identity: Qdrant compresses in chunks, and the last one waits 40 ms for a delayed ACK
            headers={"content-type": "application/json", "accept-encoding": "identity"}
            | ({"api-key": api_key} if api_key else {}),
            limits=httpx.Limits(
                max_connections=_MAX_CONNECTIONS,
                max_keepalive_connections=_MAX_CONNECTIONS,
                keepalive_expiry=_KEEPALIVE_SECONDS,
            ),
            transport=transport,
            # a developer's proxy does not know the way to this very machine
            trust_env=parsed.host not in _LOOPBACK,
        )

    def call(
        self, method: str, path: Sequence[str], body: Any = None, *, seconds: float | None = None, wait: bool = False
    ) -> Any:
        """The `result` of a call. `path` is quoted part by part; `body` is JSON, or bytes that are.

        Every call is idempotent: if the connection is lost it is sent once more.

        Raises:
            VectorStoreUnavailable: No answer in time, 5xx, or 429 with its `retry_after_seconds`.
            SetMissing: 404.
            LimitExceeded: Strict mode refuses the call (400, before 1.13 403), or 429 for one that would never be allowed.
            VectorStoreRejected: Any other 4xx.
        """
        answer = self._send(method, path, body, seconds=seconds, wait=wait)
        if not answer.is_success:
            raise self._failure(answer)
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
        """Gives the connections back. Idempotent."""
        self._client.close()

    def _send(
        self, method: str, path: Sequence[str], body: Any, *, seconds: float | None = None, wait: bool = False
    ) -> httpx.Response:
        seconds = self._read_timeout_seconds if seconds is None else seconds
        content = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        target = "/".join(quote(part, safe="") for part in path)
        request = self._client.build_request(
            method,
            f"/{target}",
            content=content,
            params={"wait": "true"} if wait else None,
            timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
        )
        try:
            try:
                answer = self._client.send(request)
            except _CONNECTION_LOST:
                answer = self._client.send(request)
        except httpx.TimeoutException:
            raise VectorStoreUnavailable(f"Qdrant at {self.address} did not answer in time.") from None
        except httpx.HTTPError as error:
            raise VectorStoreUnavailable(
                f"Qdrant at {self.address} cannot be reached ({type(error).__name__})."
            ) from None
        # httpx lets it refer to itself, and to what was sent: megabytes that would wait for the garbage collector
        answer.stream = httpx.ByteStream(b"")
        return answer

    def _failure(self, answer: httpx.Response) -> VectorStoreUnavailable | VectorStoreRejected:
        status = answer.status_code
        reason = _reason(answer)
        message = f"Qdrant at {self.address} answered {status}: {reason}"
        if (status in (400, 403) and _STRICT_MODE in reason) or (status == 429 and _OVER_CAPACITY in reason):
            return LimitExceeded(message, resolution=_RAISE_LIMIT)
        if status in (401, 403):
            return self._denied(status, reason)
        if status in (408, 429) or status >= 500:
            return VectorStoreUnavailable(message, retry_after_seconds=_retry_after(answer))
        return SetMissing(message) if status == 404 else VectorStoreRejected(message)

    def _denied(self, status: int, reason: str) -> VectorStoreRejected:
        set_key = "Set EMBEDD_QDRANT_API_KEY to a key of that Qdrant with the right to write."
        if status == 401 and "api-key" not in self._client.headers:
            return VectorStoreRejected(
                f"Qdrant at {self.address} asks for an API key, and none is set.", resolution=set_key
            )
        return VectorStoreRejected(
            f"Qdrant at {self.address} refuses the API key or the call (HTTP {status}): {reason}",
            resolution=f"{set_key} If the key is right, check that the server is not locked.",
        )


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
        reason = str(orjson.loads(answer.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.reason_phrase
    shown = _QUOTED.sub(lambda found: found[0] if found[1] in _PARAMETERS else '"…"', reason)
    return shown[:_MAX_MESSAGE]


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
