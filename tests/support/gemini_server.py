"""A loopback server that speaks Gemini's batchEmbedContents: `openai_server.py` with its form, limits and errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import orjson

from tests.support.openai_server import OpenAIServer, Refused, RunningServer, main, running_server, vector_of

_MODEL = "models/gemini-embedding-001"
_STATUSES = {400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
_FIELDS = {"model", "content", "taskType", "title", "outputDimensionality"}


class GeminiServer(OpenAIServer):
    path_ending = ":batchEmbedContents"
    key_headers = ("x-goog-api-key",)

    def error_body(self, refused: Refused) -> dict[str, Any]:
        status = _STATUSES.get(refused.status, "UNAVAILABLE" if refused.status == 503 else "INTERNAL")
        details = []
        if refused.code == "API_KEY_INVALID":
            kind = "type.googleapis.com/google.rpc.ErrorInfo"
            details = [{"@type": kind, "reason": refused.code, "domain": "googleapis.com"}]
        if refused.status == 429:
            # Google sends it in the body only
            refused.headers = {}
            delay = f"{self.behaviour.retry_after_seconds:g}s"
            details = [
                {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": "PerMinute"}]},
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay},
            ]
        error = {"code": refused.status, "message": refused.message, "status": status}
        return {"error": error | ({"details": details} if details else {})}

    def wrong_key(self, sent: str) -> Refused:
        return Refused(400, f"API key not valid: {sent[:8]}. Please pass a valid API key.", code="API_KEY_INVALID")

    def texts_of(self, request: dict[str, Any]) -> list[str]:
        return [item["content"]["parts"][0]["text"] for item in request["requests"]]

    def fields_of(self, request: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in request["requests"][0].items() if name != "content"}

    def check_request(self, request: dict[str, Any], texts: list[str]) -> int:
        items = request["requests"]
        if len(items) > 100:
            raise Refused(400, "* BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch\n")
        for item in items:
            if unknown := item.keys() - _FIELDS:
                raise Refused(400, f'Invalid JSON payload received. Unknown name "{unknown.pop()}"')
            if item["model"] != _MODEL:
                raise Refused(404, f"{item['model']} is not found for API version v1beta.")
            if not 128 <= item.get("outputDimensionality", 3072) <= 3072:
                raise Refused(400, "* EmbedContentRequest.output_dimensionality: must be between 128 and 3072")
        return self.check_texts(texts)

    def render(self, request: dict[str, Any], texts: list[str], tokens: int, *, asked: str = "") -> bytes:
        dimensions = request["requests"][0].get("outputDimensionality", 3072)
        # what is cut from the long vector is shorter than 1
        scale = 1.0 if dimensions == 3072 else 0.7
        vectors = [(vector_of(text, dimensions) * scale).tolist() for text in texts]
        if self.behaviour.garble == "short":
            vectors.pop()
        return orjson.dumps({"embeddings": [{"values": vector} for vector in vectors]})


def running_gemini_server(**behaviour: Any) -> AbstractContextManager[RunningServer]:
    """A server on a free port in a process of its own, stopped at the end."""
    return running_server("gemini_server", **behaviour)


if __name__ == "__main__":
    main(GeminiServer)
