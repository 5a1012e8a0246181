"""Gemini, by `POST {base_url}/models/{model}:batchEmbedContents`.

Plain httpx, as for OpenAI. Vectors come as numbers only. Those of fewer dimensions than the model's own are cut from the
long ones and not of length 1 (`gemini-embedding-001`), so they are made so here. The answer does not count tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Unpack
from urllib.parse import quote

from embedd_dagster.connectors.http.client import HttpEmbedder, HttpOptions, Request, check_key, estimate_tokens
from embedd_dagster.connectors.openai.answers import NOT_AN_ANSWER, load_json, read_vectors
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import ProviderKind, find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.core.unit_length import to_unit_length
from embedd_dagster.protocols.embedder import CutText, Embedded, EmbedderLimits

DEFAULT_BASE_URL: Final = "https://generativelanguage.googleapis.com/v1beta"

_MAX_ITEMS: Final = 100  # the API's own limit
# no limit is published but on the whole request's bytes
_MAX_TOKENS_PER_REQUEST: Final = 250_000
_UNKNOWN_MODEL_MAX_BYTES: Final = 2_048


class GeminiEmbedder(HttpEmbedder):
    """One model of the Gemini API, asked as RETRIEVAL_DOCUMENT for rows and as RETRIEVAL_QUERY for questions."""

    def __init__(self, *, model: str, dimensions: int, **options: Unpack[HttpOptions]) -> None:
        name = model.removeprefix("models/")
        super().__init__(
            provider="Gemini",
            model=name,
            dimensions=dimensions,
            default_base_url=DEFAULT_BASE_URL,
            **options,
        )
        key = check_key(options["api_key"], provider="Gemini", required=not options["base_url"])
        if key:
            self._http.headers["x-goog-api-key"] = key
        known = find_model(ProviderKind.GEMINI, name)
        self.limits = EmbedderLimits(
            batch=BatchLimits(max_items=_MAX_ITEMS, max_tokens=_MAX_TOKENS_PER_REQUEST),
            max_tokens_per_text=self._max_tokens_per_text(
                known.max_tokens if known else None, _UNKNOWN_MODEL_MAX_BYTES
            ),
            concurrency=self._concurrency,
        )
        fields: dict[str, Any] = {"model": f"models/{name}"}
        if known is None or known.dimensions != dimensions:
            fields["outputDimensionality"] = dimensions
        self._request = Request(
            url=self._endpoint(f"/models/{quote(name, safe='')}:batchEmbedContents"),
            options=fields,
            build=_build_body,
            required=frozenset({"model"}),
            dimensions_field="outputDimensionality",
            may_omit_dimensions=known is None,
        )

    def cut(self, text: str) -> CutText:
        """The text cut without Gemini's tokenizer, which is not public in a small form."""
        return self._cut_without_tokenizer(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts as documents: one request. Its tokens are estimated."""
        return Embedded(self._embed(texts, "RETRIEVAL_DOCUMENT"), estimate_tokens(texts))

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        vector: Vectors = self._embed([self.cut(clean_text(text)).text], "RETRIEVAL_QUERY")[0]
        return vector

    def _embed(self, texts: Sequence[str], task_type: str) -> Vectors:
        request = replace(self._request, options={**self._request.options, "taskType": task_type})
        content = self._ask_leaving_out(request, texts)
        try:
            vectors = _parse_answer(content, len(texts))
        except NOT_AN_ANSWER:
            raise self._not_an_answer(len(texts)) from None
        if vectors.shape[1] != self._dimensions:
            raise self._wrong_dimensions(vectors.shape[1])
        return to_unit_length(vectors)[0]


def _build_body(fields: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    return {"requests": [{**fields, "content": {"parts": [{"text": text}]}} for text in texts]}


def _parse_answer(content: bytes, text_count: int) -> Vectors:
    """The vectors, in the order of the requests. Raises one of `NOT_AN_ANSWER` for what is none."""
    items = load_json(content)["embeddings"]
    if len(items) != text_count:
        raise ValueError("not one vector a text")
    return read_vectors([item["values"] for item in items])
