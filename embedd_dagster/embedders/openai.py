"""OpenAI, and every server that speaks its embeddings protocol: vLLM, Ollama, TEI, LiteLLM, Azure.

Plain httpx instead of the `openai` package: that one obeys any Retry-After without a cap, retries by itself, and makes a
pydantic model of every answer. Vectors travel as base64 and become float32 without a Python float in between.
"""

from __future__ import annotations

import ipaddress
import ssl
import threading
from binascii import a2b_base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import numpy as np
import orjson

from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import ProviderKind, find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.embedders.base import CutText, Embedded, EmbedderLimits
from embedd_dagster.embedders.cutting import byte_count, cut_at_bytes, cut_at_tokens
from embedd_dagster.embedders.openai_errors import FieldRefused, refusal
from embedd_dagster.errors import EmbeddingRejected, EmbeddingUnavailable, TextRejected

DEFAULT_BASE_URL = "https://api.openai.com/v1"

_MAX_TOKENS_PER_REQUEST = 300_000
# The protocol takes 2,048. From 256 texts on the fixed cost of a request no longer shows (see benchmarks/), while what a
# killed run pays for twice, what a bisection has to search and what waits in memory all go on growing.
_DEFAULT_MAX_ITEMS = 256
_DEFAULT_CONCURRENCY = 16
# a model that the catalog does not know: bytes are never fewer than tokens
_UNKNOWN_MODEL_MAX_BYTES = 8_192
_CONNECT_TIMEOUT_SECONDS = 10.0
_PROBE_TEXT = "embedd"


@dataclass(frozen=True, slots=True)
class _Dialect:
    """Which optional fields this server takes: found out with the first answers, then remembered."""

    encoding_format: bool
    dimensions: bool


class _Answer(NamedTuple):
    vectors: Vectors
    tokens: int | None


class OpenAIEmbedder:
    """One model behind `POST {base_url}/embeddings`.

    `dimensions` is asked for where the model is known to give several; a server with a model that the catalog does not
    know is first asked without, because many reject the field even where it asks for what they give anyway.
    """

    def __init__(
        self,
        *,
        api_key: str | None,
        base_url: str | None,
        model: str,
        dimensions: int,
        concurrency: int | None = None,
        timeout_seconds: float = 60.0,
    ) -> None:
        self._model = model
        self._dimensions = dimensions
        self._timeout_seconds = timeout_seconds
        # LiteLLM and its like put the vendor before the name
        known = find_model(ProviderKind.OPENAI, model.rsplit("/", 1)[-1])
        self._is_known = known is not None
        # a known model's dialect is known; another's is found out with a word, not with a batch that is paid for twice
        self._settled = known is not None
        self._settling = threading.Lock()
        concurrency = concurrency or _DEFAULT_CONCURRENCY
        self.limits = EmbedderLimits(
            batch=BatchLimits(max_items=_DEFAULT_MAX_ITEMS, max_tokens=_MAX_TOKENS_PER_REQUEST),
            max_tokens_per_text=known.max_tokens if known else _UNKNOWN_MODEL_MAX_BYTES,
            concurrency=concurrency,
        )
        self._dialect = _Dialect(encoding_format=True, dimensions=known is not None and known.dimensions != dimensions)
        url = _parse_base_url(base_url or DEFAULT_BASE_URL)
        self._name = "OpenAI" if not base_url else f"The embedding provider at {url.host}"
        # a query such as Azure's ?api-version=… stays behind the path
        self._url = url.copy_with(path=url.path.rstrip("/") + "/embeddings")
        self._http = httpx.Client(
            headers=_headers(url, api_key),
            timeout=httpx.Timeout(timeout_seconds, connect=min(_CONNECT_TIMEOUT_SECONDS, timeout_seconds)),
            limits=httpx.Limits(max_connections=concurrency + 2, max_keepalive_connections=concurrency + 2),
            verify=_tls_context() if url.scheme == "https" else False,
            # a proxy of the environment cannot reach our own loopback
            trust_env=not _is_loopback(url.host),
        )

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit; for an unknown model by bytes, which are never fewer than tokens."""
        if self._is_known:
            return cut_at_tokens(text, self.limits.max_tokens_per_text, "cl100k_base")
        return cut_at_bytes(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts: one request; the first time, with a model that the catalog does not know, a few."""
        # a single text is a probe itself: a question is not to wait for two answers
        if not self._settled and len(texts) > 1:
            with self._settling:
                if not self._settled:
                    self._embed_in_dialect([_PROBE_TEXT])
        return self._embed_in_dialect(texts)

    def _embed_in_dialect(self, texts: Sequence[str]) -> Embedded:
        dialect = self._dialect
        tried = set()
        native_dimensions: int | None = None
        while True:
            tried.add(dialect)
            try:
                answer = self._request(texts, dialect)
            except FieldRefused as refused:
                following = replace(dialect, **{refused.field: False})
            else:
                given = answer.vectors.shape[1]
                if given == self._dimensions:
                    self._dialect = dialect
                    self._settled = True
                    estimate = sum(map(byte_count, texts)) // 4
                    return Embedded(answer.vectors, estimate if answer.tokens is None else answer.tokens)
                native_dimensions = given
                following = replace(dialect, dimensions=True)
            if following in tried:
                raise self._wrong_dimensions(native_dimensions)
            dialect = following

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        vector: Vectors = self.embed_documents([self.cut(clean_text(text)).text]).vectors[0]
        return vector

    def close(self) -> None:
        """Gives connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, texts: Sequence[str], dialect: _Dialect) -> _Answer:
        fields: dict[str, Any] = {"model": self._model, "input": list(texts)}
        if dialect.encoding_format:
            fields["encoding_format"] = "base64"
        if dialect.dimensions:
            fields["dimensions"] = self._dimensions
        try:
            body = orjson.dumps(fields)
        except TypeError:
            raise TextRejected("The text is not valid Unicode.") from None
        try:
            response = self._http.post(self._url, content=body)
        except httpx.TimeoutException:
            raise EmbeddingUnavailable(f"{self._name} did not answer within {self._timeout_seconds:g} s.") from None
        except httpx.RequestError as error:
            raise EmbeddingUnavailable(f"{self._name} cannot be reached ({type(error).__name__}).") from None
        if response.status_code != httpx.codes.OK:
            raise refusal(response, provider=self._name, model=self._model)
        try:
            answer = _parse_answer(response.content, len(texts))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            # nothing of the cause: it may quote the answer
            raise EmbeddingUnavailable(
                f"{self._name} gave an answer that is not one of the embeddings protocol, for {len(texts)} texts.",
                resolution="It is tried again. If it goes on, check that the provider's base_url is that of its API.",
            ) from None
        if not np.isfinite(answer.vectors).all():
            raise TextRejected(f"{self._name} gives a vector with numbers that are not finite.")
        return answer

    def _wrong_dimensions(self, given: int | None) -> EmbeddingRejected:
        if given is None:
            message = (
                f"{self._name} does not take `dimensions` for model {self._model!r}, and gives no vectors without."
            )
        else:
            message = (
                f"{self._name} gives vectors of {given} dimensions for model {self._model!r}, "
                f"where {self._dimensions} are configured."
            )
        return EmbeddingRejected(
            message,
            resolution="Set the vector table's embedding_dimensions to what the model gives, or change the model.",
        )


def _parse_answer(content: bytes, text_count: int) -> _Answer:
    """The vectors in the order of the texts. Raises any of several built-in errors for what is not such an answer."""
    document = orjson.loads(content)
    items = document["data"]
    if len(items) != text_count:
        raise ValueError("not one vector a text")
    by_index: list[Any] = [None] * text_count
    for position, item in enumerate(items):
        by_index[item.get("index", position)] = item["embedding"]
    if any(embedding is None for embedding in by_index):
        raise ValueError("an index is missing")
    is_base64 = isinstance(by_index[0], str)
    # in a list, null (some servers' NaN) becomes NaN
    vectors = _decode_base64(by_index) if is_base64 else np.asarray(by_index, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError("not one vector a text")
    usage = document.get("usage") or {}
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return _Answer(vectors, int(tokens) if tokens is not None else None)


def _decode_base64(embeddings: list[str]) -> Vectors:
    parts = [a2b_base64(embedding) for embedding in embeddings]
    size = len(parts[0])
    if size % 4 or any(len(part) != size for part in parts):
        raise ValueError("vectors of unlike sizes")
    # a bytearray, because an array over bytes could not be written to
    return np.frombuffer(bytearray().join(parts), dtype="<f4").reshape(len(parts), size // 4)


def _parse_base_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise EmbeddingRejected(
            "The embedding provider's base_url is not an http(s) address.",
            resolution="Give it like `https://api.openai.com/v1`, without `/embeddings`.",
        )
    return url


def _headers(url: httpx.URL, api_key: str | None) -> dict[str, str]:
    # vectors as base64 hardly get smaller by compression, but cost as much again to unpack
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "embedd"}
    key = (api_key or "").strip()
    if not key:
        if url.host == "api.openai.com":
            raise EmbeddingRejected(
                "The embedding provider has no api_key, and OpenAI asks for one.",
                resolution="Set credentials.api_key of the embedding provider.",
            )
        return headers
    if not (key.isascii() and key.isprintable()):
        raise EmbeddingRejected(
            "The embedding provider's api_key holds characters that no key has.",
            resolution="Enter credentials.api_key of the embedding provider again.",
        )
    if url.host.endswith(".azure.com"):
        headers["api-key"] = key
    else:
        headers["Authorization"] = f"Bearer {key}"
    return headers


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
