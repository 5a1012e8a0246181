"""A loopback server that speaks Voyage's embeddings protocol: `openai_server.py` with its fields, limits and words."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tests.support.openai_server import OpenAIServer, Refused, RunningServer, main, running_server

_FIELDS = {"input", "model", "input_type", "truncation", "output_dimension", "output_dtype", "encoding_format"}
_MODELS = {
    "voyage-3.5": (320_000, 32_000),
    "voyage-3.5-lite": (1_000_000, 32_000),
    "voyage-3-large": (120_000, 32_000),
}
_DIMENSIONS = (256, 512, 1024, 2048)


class VoyageServer(OpenAIServer):
    key_headers = ("authorization",)

    def error_body(self, refused: Refused) -> dict[str, Any]:
        return {"detail": refused.message}

    def wrong_key(self, sent: str) -> Refused:
        return Refused(401, f"Provided API key {sent[:8]} is invalid.")

    def check_request(self, request: dict[str, Any], texts: list[str]) -> int:
        model = request["model"]
        if unknown := request.keys() - _FIELDS:
            raise Refused(400, f"Argument '{unknown.pop()}' is not supported by our API.")
        if model not in _MODELS:
            raise Refused(400, f"Model {model} is not supported. Supported models are {sorted(_MODELS)}.")
        if request.get("input_type") not in (None, "query", "document"):
            raise Refused(400, "Value supplied for 'input_type' is not supported.")
        if request.get("output_dimension", 1024) not in _DIMENSIONS:
            raise Refused(400, f"Model {model} supports output_dimension of {_DIMENSIONS} only.")
        if len(texts) > 1000:
            raise Refused(400, "The batch size limit is 1000. Your batch size is too large.")
        most, most_per_text = _MODELS[model]
        self.behaviour.max_tokens_per_text = self.behaviour.max_tokens = most
        tokens = self.check_texts(texts)
        # every text has a prompt before it, and a token may be as short as a byte
        sizes = [len(text.encode()) + 8 for text in texts]
        if not request.get("truncation", True) and max(sizes) > most_per_text:
            raise Refused(400, f"Request to model '{model}' failed. The example at index 0 in your batch is too long.")
        if sum(sizes) > most:
            words = f"The max allowed tokens per submitted batch is {most}. Your batch has {sum(sizes)} tokens."
            raise Refused(400, f"Request to model '{model}' failed. {words}")
        return tokens

    def render(
        self, request: dict[str, Any], texts: list[str], tokens: int, *, asked: str = "output_dimension"
    ) -> bytes:
        self.behaviour.default_dimensions = 1024
        content = super().render(request, texts, tokens, asked=asked)
        return content.replace(b'"prompt_tokens":%d,' % tokens, b"")


def running_voyage_server(**behaviour: Any) -> AbstractContextManager[RunningServer]:
    """A server on a free port in a process of its own, stopped at the end."""
    return running_server("voyage_server", **behaviour)


if __name__ == "__main__":
    main(VoyageServer)
