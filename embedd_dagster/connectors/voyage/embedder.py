"""Voyage, by `POST {base_url}/embeddings`: OpenAI's answer to other questions, with limits of each model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Unpack

from embedd_dagster.connectors.http.client import HttpEmbedder, HttpOptions, Request, check_key, estimate_tokens
from embedd_dagster.connectors.openai.answers import NOT_AN_ANSWER, parse_answer
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import ProviderKind, find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.protocols.embedder import CutText, Embedded, EmbedderLimits

DEFAULT_BASE_URL: Final = "https://api.voyageai.com/v1"

# the API takes 1,000; see openai.py for why fewer are sent
_MAX_ITEMS: Final = 256
_MAX_TOKENS_PER_REQUEST: Final = {
    "voyage-4-lite": 1_000_000,
    "voyage-3.5-lite": 1_000_000,
    "voyage-4": 320_000,
    "voyage-3.5": 320_000,
}
_LEAST_MAX_TOKENS_PER_REQUEST: Final = 120_000
_UNKNOWN_MODEL_MAX_BYTES: Final = 16_000
# Voyage puts "Represent the document for retrieval: " before each text
_PROMPT_TOKENS: Final = 16


class VoyageEmbedder(HttpEmbedder):
    """One model of Voyage, asked with input_type `document` for rows and `query` for questions."""

    def __init__(self, *, model: str, dimensions: int, **options: Unpack[HttpOptions]) -> None:
        super().__init__(
            provider="Voyage",
            model=model,
            dimensions=dimensions,
            default_base_url=DEFAULT_BASE_URL,
            **options,
        )
        key = check_key(options["api_key"], provider="Voyage", required=not options["base_url"])
        if key:
            self._http.headers["Authorization"] = f"Bearer {key}"
        known = find_model(ProviderKind.VOYAGE, model)
        most = _MAX_TOKENS_PER_REQUEST.get(model, _LEAST_MAX_TOKENS_PER_REQUEST)
        self.limits = EmbedderLimits(
            batch=BatchLimits(max_items=_MAX_ITEMS, max_tokens=most - _MAX_ITEMS * _PROMPT_TOKENS),
            max_tokens_per_text=max(
                1,
                self._max_tokens_per_text(known.max_tokens if known else None, _UNKNOWN_MODEL_MAX_BYTES)
                - _PROMPT_TOKENS,
            ),
            concurrency=self._concurrency,
        )
        # what is longer is cut and counted here: a text that were cut there would be cut in silence
        fields: dict[str, Any] = {"model": model, "encoding_format": "base64", "truncation": False}
        if known is None or known.dimensions != dimensions:
            fields["output_dimension"] = dimensions
        self._request = Request(
            url=self._endpoint("/embeddings"),
            options=fields,
            build=lambda fields, texts: {**fields, "input": list(texts)},
            required=frozenset({"model"}),
            dimensions_field="output_dimension",
            may_omit_dimensions=known is None,
        )

    def cut(self, text: str) -> CutText:
        """The text cut without Voyage's tokenizers, which would have to be downloaded."""
        return self._cut_without_tokenizer(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts as documents: one request."""
        return self._embed(texts, "document")

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        vector: Vectors = self._embed([self.cut(clean_text(text)).text], "query").vectors[0]
        return vector

    def _embed(self, texts: Sequence[str], input_type: str) -> Embedded:
        request = replace(self._request, options={**self._request.options, "input_type": input_type})
        content = self._ask_leaving_out(request, texts)
        try:
            answer = parse_answer(content, len(texts))
        except NOT_AN_ANSWER:
            raise self._not_an_answer(len(texts)) from None
        given = answer.vectors.shape[1]
        if given != self._dimensions:
            raise self._wrong_dimensions(given)
        return Embedded(answer.vectors, estimate_tokens(texts) if answer.tokens is None else answer.tokens)
