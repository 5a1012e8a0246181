"""OpenAI, and every server that speaks its embeddings protocol: vLLM, Ollama, TEI, LiteLLM, Azure.

The `openai` package sends the requests, over our HTTP client and without its retries: it would obey a Retry-After of up
to two minutes by itself. The answer is taken raw. Vectors travel as base64 and become float32 without Python floats.
"""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from embedd_dagster.connectors.http.embedder import HttpEmbedder
from embedd_dagster.connectors.openai.models import MODELS
from embedd_dagster.connectors.openai.tokenizer import cut_at_tokens
from embedd_dagster.core.text_cutting import CutText


class OpenAIEmbedder(HttpEmbedder):
    """One model behind `POST {base_url}/embeddings`.

    A server with a model that the catalog does not know is first asked without `dimensions`: many refuse the field, even
    for the dimensions that they give anyway.
    """

    models = MODELS
    title = "OpenAI"
    default_base_url = "https://api.openai.com/v1"
    # The protocol takes 2,048. From 256 texts on the fixed cost of a request no longer shows (see benchmarks/), but the
    # texts that a killed run pays for twice, that a bisection searches and that wait in memory would go on growing.
    max_items = 256
    max_tokens_per_request = 300_000
    unknown_model_max_bytes = 8_192
    is_spoken_by_others: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        """Options are those of `HttpEmbedder`."""
        super().__init__(**options)
        from openai import OpenAI  # a second of CPU: not before an embedder is opened

        self._openai = OpenAI(
            # our client sets the headers, and the address is given, so OPENAI_… of the environment does not count
            api_key=self._api_key or "none",
            base_url=str(self.url),
            http_client=self.http,  # type: ignore[arg-type]  # httpx is accepted, but the types name httpx2 only
            max_retries=0,
            timeout=self._timeout_seconds,
        )

    @property
    def _catalog_name(self) -> str:
        # LiteLLM and others put the vendor before the name
        return self._model.rsplit("/", 1)[-1]

    def _key_headers(self, host: str, key: str) -> dict[str, str]:
        return {"api-key": key} if host.endswith(".azure.com") else super()._key_headers(host, key)

    def _fields(self, *, is_query: bool) -> dict[str, Any]:  # noqa: ARG002 - the same for both
        return {"model": self._model, "encoding_format": "base64"}

    def _post(self, content: bytes) -> httpx.Response:
        from openai import APIConnectionError, APIStatusError

        try:
            return self._openai.post(str(self.url), content=content, cast_to=httpx.Response)
        except APIStatusError as error:
            return error.response  # type: ignore[return-value]  # of our client, so httpx's
        except APIConnectionError as error:
            cause = error.__cause__
        raise cause or httpx.ConnectError("No connection.")

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit; for an unknown model without its tokenizer."""
        if self._known:
            return cut_at_tokens(text, self.limits.max_tokens_per_text, "cl100k_base")
        return super().cut(text)
