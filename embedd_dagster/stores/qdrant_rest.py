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

from embedd_dagster.errors import ConfigurationError, VectorStoreRejected, VectorStoreUnavailable

_CONNECT_SECONDS: Final = 5.0
_MAX_CONNECTIONS: Final = 64
_MAX_MESSAGE: Final = 300
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_QUOTED: Final = re.compile(r'"[^"]*"')

READ_SECONDS: Final = 30.0
WRITE_SECONDS: Final = 120.0
SLOW_SECONDS: Final = 600.0
"""For what may take as long as there are points: payload indexes, exact counts."""


class SetMissing(VectorStoreRejected):
    """The collection is not there (any more)."""


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
        self._client = httpx.Client(
            base_url=parsed,
            headers={"content-type": "application/json"} | ({"api-key": api_key} if api_key else {}),
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS),
            transport=transport,
            # a developer's proxy does not know the way to this very machine
            trust_env=parsed.host not in _LOOPBACK,
        )

    def call(
        self, method: str, path: Sequence[str], body: Any = None, *, seconds: float | None = None, wait: bool = False
    ) -> Any:
        """The `result` of a call. `path` is quoted part by part; `body` is JSON, or bytes that are.

        Raises:
            VectorStoreUnavailable: No answer in time, 5xx, or 429 with its `retry_after_seconds`.
            SetMissing: 404.
            VectorStoreRejected: Any other 4xx.
        """
        seconds = self._read_timeout_seconds if seconds is None else seconds
        content = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        target = "/".join(quote(part, safe="") for part in path)
        try:
            answer = self._client.request(
                method,
                f"/{target}",
                content=content,
                params={"wait": "true"} if wait else None,
                timeout=httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            )
        except httpx.TimeoutException:
            raise VectorStoreUnavailable(f"Qdrant at {self.address} did not answer in time.") from None
        except httpx.HTTPError as error:
            raise VectorStoreUnavailable(
                f"Qdrant at {self.address} cannot be reached ({type(error).__name__})."
            ) from None
        # httpx lets it refer to itself, and to what was sent: megabytes that would wait for the garbage collector
        answer.stream = httpx.ByteStream(b"")
        if not answer.is_success:
            raise self._failure(answer)
        try:
            return orjson.loads(answer.content)["result"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise VectorStoreRejected(
                f"What answers at {self.address} does not speak Qdrant's protocol.",
                resolution="Check EMBEDD_QDRANT_URL: it is the address of Qdrant's REST interface, usually port 6333.",
            ) from None

    def close(self) -> None:
        """Gives the connections back. Idempotent."""
        self._client.close()

    def _failure(self, answer: httpx.Response) -> VectorStoreUnavailable | VectorStoreRejected:
        status = answer.status_code
        if status in (401, 403):
            return VectorStoreRejected(
                f"Qdrant at {self.address} refuses the API key (HTTP {status}).",
                resolution="Set EMBEDD_QDRANT_API_KEY to a key of that Qdrant with the right to write.",
            )
        message = f"Qdrant at {self.address} answered {status}: {_reason(answer)}"
        if status == 429 or status >= 500 or status == 408:
            return VectorStoreUnavailable(message, retry_after_seconds=_retry_after(answer))
        if status == 404:
            return SetMissing(message)
        return VectorStoreRejected(message)


def _reason(answer: httpx.Response) -> str:
    try:
        reason = str(orjson.loads(answer.content)["status"]["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer.reason_phrase
    # what stands in quotes may be a value of a row
    return _QUOTED.sub('"…"', reason)[:_MAX_MESSAGE]


def _retry_after(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
