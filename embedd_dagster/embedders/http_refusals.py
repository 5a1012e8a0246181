"""Answers of the OpenAI protocol that are not 200 → what is to be done about them.

Only identifiers of the answer (code, type, param) are repeated to users: its message may quote a text, or a part of the key.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import httpx
import orjson

from embedd_dagster.embedders.http_answers import retry_after_seconds
from embedd_dagster.errors import (
    EmbeddError,
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_ACCOUNT_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
)
_KEY_CODES = frozenset({"invalid_api_key", "invalid_authentication", "missing_api_key"})
_MODEL_CODES = frozenset({"model_not_found", "invalid_model", "unsupported_model", "DeploymentNotFound"})
# by the words of OpenAI, TEI and Gemini's adapter for "more texts, or more tokens, than one request may hold"
_TOO_LARGE = re.compile(r"batch size|too many inputs|array.{0,20}(too )?long|max_tokens_per_request|at most \d+ ", re.I)


class FieldRefused(Exception):
    """The server does not take an optional field of the request."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class _Fault(NamedTuple):
    identifiers: tuple[str, ...]
    param: str
    message: str
    """Only to be looked at, never to be shown."""


def refusal(  # noqa: PLR0911 - one table of answers, best read at once
    response: httpx.Response, *, provider: str, model: str
) -> EmbeddError | FieldRefused:
    """The error to raise for an answer that is not 200."""
    status = response.status_code
    fault = _read_fault(response.content)
    reason = ", ".join((f"HTTP {status}", *fault.identifiers))
    codes = set(fault.identifiers)
    if codes & _ACCOUNT_CODES or status == 402:
        return EmbeddingRejected(
            f"{provider} serves this account no more ({reason}).",
            resolution="Look at the quota and billing of the account behind the embedding provider's api_key.",
        )
    if status in {401, 403} or codes & _KEY_CODES:
        return EmbeddingRejected(
            f"{provider} refuses the api_key ({reason}).",
            resolution="Set credentials.api_key of the embedding provider to a key that may use embeddings.",
        )
    if status == 404 or codes & _MODEL_CODES or fault.param == "model":
        return EmbeddingRejected(
            f"{provider} does not have model {model!r}, or no embeddings at this address ({reason}).",
            resolution="Check the vector table's embedding_model, and that base_url ends before `/embeddings`.",
        )
    if status == 429:
        return EmbeddingRateLimited(
            f"{provider} asks to slow down ({reason}).", retry_after_seconds=retry_after_seconds(response.headers)
        )
    if status in {400, 413, 422}:
        return _bad_request(status, fault, f"{provider} refuses the text ({reason}).")
    # Ollama's answer to a text whose vector holds a NaN
    if status >= 500 and "unsupported value: NaN" in fault.message:
        return TextRejected(f"{provider} fails on this text: its vector holds a NaN ({reason}).")
    if status >= 500 or status in {408, 409, 424, 425}:
        return EmbeddingUnavailable(
            f"{provider} fails at present ({reason}).", retry_after_seconds=retry_after_seconds(response.headers)
        )
    return EmbeddingRejected(
        f"{provider} does not answer as an embeddings server does ({reason}).",
        resolution="Check the embedding provider's base_url: it must be that of the API, such as `https://host/v1`.",
    )


def _bad_request(status: int, fault: _Fault, message: str) -> EmbeddError | FieldRefused:
    words = fault.message.lower()
    if fault.param == "dimensions" or "dimensions" in words or "matryoshka" in words:
        return FieldRefused("dimensions")
    if fault.param == "encoding_format" or "encoding_format" in words:
        return FieldRefused("encoding_format")
    too_large = status == 413 or bool(_TOO_LARGE.search(f"{words} {' '.join(fault.identifiers)}"))
    return TextRejected(message, too_large=too_large)


def _read_fault(content: bytes) -> _Fault:
    """What the body says, in any of the forms that servers of this protocol have."""
    try:
        document: Any = orjson.loads(content)
    except ValueError:
        document = {}
    error = document.get("error", document) if isinstance(document, dict) else {}
    if isinstance(error, str):
        error = {**document, "message": document.get("message", error)}
    if not isinstance(error, dict):
        error = {}
    named = (str(error.get(name) or "") for name in ("code", "type", "error_type"))
    identifiers = tuple(dict.fromkeys(name for name in named if _IDENTIFIER.fullmatch(name)))
    message = error.get("message") or error.get("detail") or ""
    return _Fault(identifiers, str(error.get("param") or ""), message if isinstance(message, str) else "")
