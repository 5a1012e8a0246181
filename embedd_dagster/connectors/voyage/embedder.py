"""Voyage, by `POST {base_url}/embeddings`: OpenAI's form of answer, other fields in the request, limits for each model."""

from __future__ import annotations

from typing import Any, Final

from embedd_dagster.connectors.http.embedder import HttpEmbedder
from embedd_dagster.connectors.voyage.models import MODELS

_MAX_TOKENS_PER_REQUEST: Final = {
    "voyage-4-lite": 1_000_000,
    "voyage-3.5-lite": 1_000_000,
    "voyage-4": 320_000,
    "voyage-3.5": 320_000,
}


class VoyageEmbedder(HttpEmbedder):
    """One model of Voyage, asked with input_type `document` for rows and `query` for questions.

    Texts are cut without Voyage's tokenizers, which would have to be downloaded.
    """

    models = MODELS
    title = "Voyage"
    default_base_url = "https://api.voyageai.com/v1"
    max_items = 256  # the API takes 1,000; see OpenAIEmbedder for why fewer are sent
    max_tokens_per_request = 120_000  # of the models that are not listed above
    unknown_model_max_bytes = 16_000
    prompt_tokens = 16  # "Represent the document for retrieval: "
    dimensions_field = "output_dimension"

    def _request_tokens(self) -> int:
        return _MAX_TOKENS_PER_REQUEST.get(self._model, self.max_tokens_per_request)

    def _fields(self, *, is_query: bool) -> dict[str, Any]:
        # without truncation: longer texts are cut and counted here, the provider would cut them silently
        return {
            "model": self._model,
            "encoding_format": "base64",
            "truncation": False,
            "input_type": "query" if is_query else "document",
        }
