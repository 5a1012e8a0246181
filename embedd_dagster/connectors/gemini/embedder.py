"""Gemini, by `POST {base_url}/models/{model}:batchEmbedContents`.

Vectors come as numbers only, and the answer does not count tokens. Vectors of fewer dimensions than the model's own are cut
from the long ones and do not have length 1 (`gemini-embedding-001`), so they are scaled here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from embedd_dagster.connectors.gemini.models import MODELS
from embedd_dagster.connectors.http.answers import Answer, load_json, read_vectors
from embedd_dagster.connectors.http.embedder import HttpEmbedder
from embedd_dagster.core.unit_length import to_unit_length


class GeminiEmbedder(HttpEmbedder):
    """One model of the Gemini API, asked as RETRIEVAL_DOCUMENT for rows and as RETRIEVAL_QUERY for questions.

    Texts are cut without Gemini's tokenizer, which is not public in a small form.
    """

    models = MODELS
    title = "Gemini"
    default_base_url = "https://generativelanguage.googleapis.com/v1beta"
    max_items = 100  # the API's own limit
    max_tokens_per_request = 250_000  # the API publishes only a limit on the bytes of a request
    unknown_model_max_bytes = 2_048
    dimensions_field = "outputDimensionality"

    @property
    def _catalog_name(self) -> str:
        return self._model.removeprefix("models/")

    def _path(self) -> str:
        return f"/models/{quote(self._catalog_name, safe='')}:batchEmbedContents"

    def _key_headers(self, host: str, key: str) -> dict[str, str]:  # noqa: ARG002
        return {"x-goog-api-key": key}

    def _fields(self, *, is_query: bool) -> dict[str, Any]:
        task = "RETRIEVAL_QUERY" if is_query else "RETRIEVAL_DOCUMENT"
        return {"model": f"models/{self._catalog_name}", "taskType": task}

    def _body(self, fields: Mapping[str, Any], texts: Sequence[str]) -> Mapping[str, Any]:
        return {"requests": [{**fields, "content": {"parts": [{"text": text}]}} for text in texts]}

    def _parse(self, content: bytes, text_count: int) -> Answer:
        items = load_json(content)["embeddings"]
        if len(items) != text_count:
            raise ValueError("not one vector per text")
        vectors = read_vectors([item["values"] for item in items])
        return Answer(to_unit_length(vectors)[0], None)
