"""OpenAI, and every server that speaks its embeddings protocol: vLLM, Ollama, TEI, LiteLLM, Azure.

Plain httpx instead of the `openai` package: that one obeys any Retry-After without a cap, retries by itself, and makes a
pydantic model of every answer. Vectors travel as base64 and become float32 without a Python float in between.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import httpx

from embedd_dagster.connectors.http.client import HttpEmbedder, HttpOptions, check_key, estimate_tokens
from embedd_dagster.connectors.http.rejections import FieldRefused
from embedd_dagster.connectors.openai.answers import NOT_AN_ANSWER, Answer, parse_answer
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import ProviderKind, find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.protocols.cutting import cut_at_tokens
from embedd_dagster.protocols.embedder import CutText, Embedded, EmbedderLimits
from embedd_dagster.protocols.suspicion import PROBE_TEXT

DEFAULT_BASE_URL = "https://api.openai.com/v1"

_MAX_TOKENS_PER_REQUEST = 300_000
# The protocol takes 2,048. From 256 texts on the fixed cost of a request no longer shows (see benchmarks/), while what a
# killed run pays for twice, what a bisection has to search and what waits in memory all go on growing.
_DEFAULT_MAX_ITEMS = 256
_REQUIRED_FIELDS = frozenset({"model", "input"})
# a model that the catalog does not know: bytes are never fewer than tokens
_UNKNOWN_MODEL_MAX_BYTES = 8_192


@dataclass(frozen=True, slots=True)
class _Dialect:
    """Which optional fields this server takes: found out with the first answers, then remembered."""

    encoding_format: bool
    dimensions: bool


class OpenAIEmbedder(HttpEmbedder):
    """One model behind `POST {base_url}/embeddings`.

    `dimensions` is asked for where the model is known to give several; a server with a model that the catalog does not
    know is first asked without, because many reject the field even where it asks for what they give anyway.
    """

    def __init__(self, *, model: str, dimensions: int, **options: Unpack[HttpOptions]) -> None:
        super().__init__(
            provider="OpenAI",
            model=model,
            dimensions=dimensions,
            default_base_url=DEFAULT_BASE_URL,
            **options,
        )
        self._http.headers.update(_key_header(self._base_url, options["api_key"]))
        self._url = self._endpoint("/embeddings")
        # LiteLLM and its like put the vendor before the name
        known = find_model(ProviderKind.OPENAI, model.rsplit("/", 1)[-1])
        self._is_known = known is not None
        # a known model's dialect is known; another's is found out with a word, not with a batch that is paid for twice
        self._settled = known is not None
        self._settling = threading.Lock()
        self.limits = EmbedderLimits(
            batch=BatchLimits(max_items=_DEFAULT_MAX_ITEMS, max_tokens=_MAX_TOKENS_PER_REQUEST),
            max_tokens_per_text=self._max_tokens_per_text(
                known.max_tokens if known else None, _UNKNOWN_MODEL_MAX_BYTES
            ),
            concurrency=self._concurrency,
        )
        self._dialect = _Dialect(encoding_format=True, dimensions=known is not None and known.dimensions != dimensions)

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit; for an unknown model without its tokenizer."""
        if self._is_known:
            return cut_at_tokens(text, self.limits.max_tokens_per_text, "cl100k_base")
        return self._cut_without_tokenizer(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts: one request; the first time, with a model that the catalog does not know, a few."""
        # a single text is a probe itself: a question is not to wait for two answers
        if not self._settled and len(texts) > 1:
            with self._settling:
                if not self._settled:
                    self._embed_in_dialect([PROBE_TEXT])
        return self._embed_in_dialect(texts)

    def _embed_in_dialect(self, texts: Sequence[str]) -> Embedded:
        dialect = self._dialect
        tried = set()
        native_dimensions: int | None = None
        refusal: tuple[FieldRefused, _Dialect] | None = None
        while dialect not in tried:
            tried.add(dialect)
            try:
                answer = self._request(texts, dialect)
            except FieldRefused as refused:
                refusal = refused, dialect
                dialect = replace(dialect, **{refused.field: False})
                continue
            native_dimensions = answer.vectors.shape[1]
            if native_dimensions == self._dimensions:
                self._dialect = dialect
                self._settled = True
                return Embedded(answer.vectors, estimate_tokens(texts) if answer.tokens is None else answer.tokens)
            dialect = replace(dialect, dimensions=True)
        if refusal:
            blamed, of_dialect = refusal
            self._check_blame(blamed, lambda: self._request([PROBE_TEXT], of_dialect))
        raise self._wrong_dimensions(native_dimensions)

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        vector: Vectors = self.embed_documents([self.cut(clean_text(text)).text]).vectors[0]
        return vector

    def _request(self, texts: Sequence[str], dialect: _Dialect) -> Answer:
        fields: dict[str, Any] = {"model": self._model, "input": list(texts)}
        if dialect.encoding_format:
            fields["encoding_format"] = "base64"
        if dialect.dimensions:
            fields["dimensions"] = self._dimensions
        content = self._ask(self._url, fields, texts, fields.keys() - _REQUIRED_FIELDS)
        try:
            answer = parse_answer(content, len(texts))
        except NOT_AN_ANSWER:
            raise self._not_an_answer(len(texts)) from None
        return answer


def _key_header(url: httpx.URL, api_key: str | None) -> dict[str, str]:
    key = check_key(api_key, provider="OpenAI", required=url.host == "api.openai.com")
    if not key:
        return {}
    return {"api-key": key} if url.host.endswith(".azure.com") else {"Authorization": f"Bearer {key}"}
