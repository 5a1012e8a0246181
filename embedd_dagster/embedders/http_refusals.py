"""Answers of embedding APIs that are not 200 → what is to be done about them.

One table for all: OpenAI and its likes, Gemini (Google's `error.status` and `error.details`), Voyage (`detail`). Only
identifiers of the answer (code, type, status, reason) are repeated to users: its message may quote a text, or a part of the key.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import httpx
import orjson

from embedd_dagster.embedders.http_answers import parse_duration, retry_after_seconds
from embedd_dagster.embedders.stated_limits import stated_request_limit, stated_text_limit
from embedd_dagster.embedders.suspicion import Failure
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
# Gemini answers 400 to a wrong key
_KEY_CODES = frozenset({"invalid_api_key", "invalid_authentication", "missing_api_key", "API_KEY_INVALID"})
_MODEL_CODES = frozenset({"model_not_found", "invalid_model", "unsupported_model", "DeploymentNotFound"})
# Voyage's words, with status 400; only at the beginning, as what follows may quote a text
_UNKNOWN_MODEL = re.compile(r"(the )?model \S{1,100} (is not|does not exist|was not found)", re.I)
# by the words of OpenAI, TEI, Gemini and Voyage for "more texts, or more tokens, than one request may hold"
_TOO_LARGE = re.compile(
    r"batch size|too many inputs|array.{0,20}(too )?long|max_tokens_per_request|at most \d+ |tokens per submitted batch",
    re.I,
)
_DIMENSIONS = re.compile(r"dimensions|output_?dimension|matryoshka", re.I)


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
    retry_after_seconds: float | None
    """In the body, as Google says it."""


def refusal(  # noqa: PLR0911 - one table of answers, best read at once
    response: httpx.Response, *, provider: str, model: str
) -> EmbeddError | FieldRefused:
    """The error to raise for an answer that is not 200."""
    status = response.status_code
    fault = _read_fault(response.content)
    reason = ", ".join((f"HTTP {status}", *fault.identifiers))
    codes = set(fault.identifiers)
    wanted = fault.retry_after_seconds
    if wanted is None:
        wanted = retry_after_seconds(response.headers)
    if codes & _ACCOUNT_CODES or status == 402:
        return EmbeddingRejected(
            f"{provider} serves this account no more ({reason}).",
            resolution="Look at the quota and billing of the account behind the embedding provider's api_key.",
        )
    if status in {401, 403} or codes & _KEY_CODES:
        return EmbeddingRejected(
            f"{provider} refuses the api_key ({reason}).",
            resolution="Set credentials.api_key of the embedding provider to a key that may use embeddings.",
            # a firewall in front of the provider may refuse one text like this
            failure=Failure.REFUSED if status == 403 and not codes & _KEY_CODES else Failure.ERROR,
        )
    if codes & {"FAILED_PRECONDITION"}:
        return EmbeddingRejected(
            f"{provider} does not serve this account from here ({reason}).",
            resolution="Check that the account is billed, and that the provider serves the country this service runs in.",
        )
    is_model_unknown = status == 400 and _UNKNOWN_MODEL.match(fault.message)
    if status == 404 or codes & _MODEL_CODES or fault.param == "model" or is_model_unknown:
        return EmbeddingRejected(
            f"{provider} does not have model {model!r}, or no embeddings at this address ({reason}).",
            resolution="Check the vector table's embedding_model, and that base_url is that of the API (before `/embeddings`).",
        )
    if status == 429 and (request_limit := stated_request_limit(fault.message)):
        return TextRejected(
            f"{provider} refuses the request as too large for this account ({reason}).", **request_limit
        )
    if status == 429:
        return EmbeddingRateLimited(f"{provider} asks to slow down ({reason}).", retry_after_seconds=wanted)
    if status in {400, 413, 422}:
        return _bad_request(status, fault, f"{provider} refuses the text ({reason}).")
    if status >= 500 and (text_limit := stated_text_limit(fault.message)):
        return TextRejected(f"{provider} refuses the text as too long ({reason}).", **text_limit)
    # Ollama's answer to a text whose vector holds a NaN
    if status >= 500 and "unsupported value: NaN" in fault.message:
        return TextRejected(f"{provider} fails on this text: its vector holds a NaN ({reason}).")
    if status >= 500 or status in {408, 409, 424, 425}:
        return EmbeddingUnavailable(f"{provider} fails at present ({reason}).", retry_after_seconds=wanted)
    return EmbeddingRejected(
        f"{provider} does not answer as an embeddings server does ({reason}).",
        resolution="Check the embedding provider's base_url: it must be that of the API, such as `https://host/v1`.",
        failure=Failure.REFUSED,
    )


def _bad_request(status: int, fault: _Fault, message: str) -> EmbeddError | FieldRefused:
    if text_limit := stated_text_limit(fault.message):
        return TextRejected(message, **text_limit)
    words = fault.message.lower()
    if fault.param == "dimensions" or _DIMENSIONS.search(words):
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
    if isinstance(document, list) and document:
        document = document[0]  # Gemini's adapter for OpenAI's protocol
    error = document.get("error", document) if isinstance(document, dict) else {}
    if isinstance(error, str):
        error = {**document, "message": document.get("message", error)}
    if not isinstance(error, dict):
        error = {}
    details = error.get("details")
    details = [item for item in details if isinstance(item, dict)] if isinstance(details, list) else []
    named = [str(error.get(name) or "") for name in ("code", "type", "error_type", "status")]
    named += [str(item.get("reason") or "") for item in details]
    identifiers = tuple(dict.fromkeys(name for name in named if _IDENTIFIER.fullmatch(name)))
    delays = (item["retryDelay"] for item in details if isinstance(item.get("retryDelay"), str))
    message = error.get("message") or error.get("detail") or ""
    return _Fault(
        identifiers,
        str(error.get("param") or ""),
        message if isinstance(message, str) else "",
        next(map(parse_duration, delays), None),
    )
