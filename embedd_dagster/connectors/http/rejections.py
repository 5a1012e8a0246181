"""Maps answers of embedding APIs that are not 200 to errors.

One table for all: OpenAI and compatible servers, Gemini (Google's `error.status` and `error.details`), Voyage (`detail`).
Fields of the answer (`param`, `code`, `type`, `loc`) count before the words of its message, and words that it quotes from
the texts of the request do not count. Users see only identifiers of the answer (code, type, status, reason), because its
message may quote a text or a part of the key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

import httpx

from embedd_dagster.connectors.http.error_bodies import Fault, quoted_locations, read_fault
from embedd_dagster.connectors.http.quotes import without_quotes
from embedd_dagster.connectors.http.retry_after import retry_after_seconds
from embedd_dagster.connectors.http.stated_limits import stated_request_limit, stated_text_limit
from embedd_dagster.errors import (
    EmbeddError,
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)
from embedd_dagster.protocols.embedder import Failure

_ACCOUNT_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
)
# Gemini answers 400 to a wrong key
_KEY_CODES = frozenset({"invalid_api_key", "invalid_authentication", "missing_api_key", "API_KEY_INVALID"})
_MODEL_CODES = frozenset({"model_not_found", "invalid_model", "unsupported_model", "DeploymentNotFound"})
_TEXT_CODES = frozenset(
    {
        "context_length_exceeded",
        "string_above_max_length",
        "string_too_long",
        "content_filter",
        "content_policy_violation",
    }
)
# Voyage's words, with status 400
_UNKNOWN_MODEL = re.compile(r"^\W*(the )?model \S{1,100} (is not|does not exist|was not found)", re.I | re.M)
# the words of OpenAI, TEI, Gemini and Voyage for "more texts or tokens than one request may contain"
_TOO_LARGE = re.compile(
    r"batch size|too many inputs|array.{0,20}(too )?long|max_tokens_per_request|at most \d+ |tokens per submitted batch",
    re.I,
)
_NAN = "unsupported value: nan"
_BAD_REQUESTS: Final = frozenset({400, 413, 422})
# these may refuse any request, independent of its fields
_OF_NO_FIELD: Final = frozenset({401, 402, 403, 408, 429})
_TEXT_PARAMETERS: Final = frozenset({"input", "inputs", "text", "texts", "prompt", "content", "contents", "parts"})
_CONTAINERS: Final = frozenset({"body", "json", "data", "request", "requests", "query", "properties"})
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# "unknown field `x`", "'x' was unexpected", "x is not supported", "Setting x is not allowed", "property x should not exist"
_REFUSAL_WORDS = re.compile(
    r"unknown|unrecogni[sz]ed|unsupported|unexpected|not (?:currently )?support|not allowed|not permitted|should not exist"
    r"|extra_forbidden|(?:extra|additional) (?:input|field|propert)",
)
# other words that servers use for these fields
_SYNONYMS: Final = {
    "dimension": "dimensions",
    "dimensions": "dimensions",
    "matryoshka": "dimensions",
    "outputdimension": "dimensions",
    "outputdimensions": "dimensions",
    "outputdimensionality": "dimensions",
    "base64": "encodingformat",
}


class FieldRefused(Exception):
    """The server does not accept an optional field of the request."""

    def __init__(self, field: str, rejection: TextRejected, *, is_certain: bool) -> None:
        super().__init__(field)
        self.field = field
        self.rejection = rejection
        """The error if the answer is about a text after all."""
        self.is_certain = is_certain
        """Whether the answer names the field in a field, not only in its message."""


class _RefusedField(NamedTuple):
    name: str
    is_certain: bool


def refusal(  # noqa: PLR0911 - one table of answers
    response: httpx.Response,
    *,
    provider: str,
    model: str,
    texts: Sequence[str] = (),
    optional: Collection[str] = (),
) -> EmbeddError | FieldRefused:
    """The error to raise for an answer that is not 200.

    `texts` are the texts of the request, `optional` its fields that can be left out.
    """
    status = response.status_code
    fault = read_fault(response.content)
    reason = ", ".join((f"HTTP {status}", *fault.identifiers))
    codes = set(fault.identifiers)
    wanted = fault.retry_after_seconds
    if wanted is None:
        wanted = retry_after_seconds(response.headers)
    if account := _account_refusal(status, codes, f"({reason})", provider=provider):
        return account
    words = _own_words(fault, texts, optional)
    parameters = [*fault.parameters, *quoted_locations(words)]
    text_limit = stated_text_limit(words)
    is_about_text = bool(text_limit) or _is_about_text(parameters, codes)
    rejection = TextRejected(
        f"{provider} refuses the text ({reason}).",
        **text_limit or {"too_large": status == 413 or _is_too_large(words, codes)},
    )
    if status not in _OF_NO_FIELD:
        words_of_fields = "" if is_about_text else words
        if field := _refused_field(status, parameters, words_of_fields, optional):
            return FieldRefused(field.name, rejection, is_certain=field.is_certain)
    names_model = status == 400 and not is_about_text and _UNKNOWN_MODEL.search(words)
    if status == 404 or codes & _MODEL_CODES or _is_about_model(parameters) or names_model:
        return EmbeddingRejected(
            f"{provider} does not have model {model!r}, or no embeddings at this address ({reason}).",
            resolution="Check the vector table's embedding_model, and that base_url is that of the API (before `/embeddings`).",
        )
    if status == 429 and (request_limit := stated_request_limit(words)):
        return TextRejected(
            f"{provider} refuses the request as too large for this account ({reason}).", **request_limit
        )
    if status == 429:
        return EmbeddingRateLimited(f"{provider} asks to slow down ({reason}).", retry_after_seconds=wanted)
    if status in _BAD_REQUESTS:
        return rejection
    if status >= 500 and text_limit:
        return TextRejected(f"{provider} refuses the text as too long ({reason}).", **text_limit)
    # Ollama's answer to a text whose vector holds a NaN
    if status >= 500 and _NAN in words:
        return TextRejected(f"{provider} fails on this text: its vector holds a NaN ({reason}).")
    if status >= 500 or status in {408, 409, 424, 425}:
        return EmbeddingUnavailable(f"{provider} is failing at present ({reason}).", retry_after_seconds=wanted)
    return EmbeddingRejected(
        f"{provider} does not answer as an embeddings server does ({reason}).",
        resolution="Check the embedding provider's base_url: it must be that of the API, such as `https://host/v1`.",
        failure=Failure.REFUSED,
    )


def _account_refusal(status: int, codes: set[str], reason: str, *, provider: str) -> EmbeddingRejected | None:
    """The error if the answer is about the account or its key."""
    if codes & _ACCOUNT_CODES or status == 402:
        return EmbeddingRejected(
            f"{provider} no longer serves this account {reason}.",
            resolution="Check the quota and billing of the account of the embedding provider's api_key.",
        )
    if status in {401, 403} or codes & _KEY_CODES:
        return EmbeddingRejected(
            f"{provider} refuses the api_key {reason}.",
            resolution="Set credentials.api_key of the embedding provider to a key that may use embeddings.",
            # a firewall in front of the provider may refuse one text like this
            failure=Failure.REFUSED if status == 403 and not codes & _KEY_CODES else Failure.ERROR,
        )
    if codes & {"FAILED_PRECONDITION"}:
        return EmbeddingRejected(
            f"{provider} does not serve this account from here {reason}.",
            resolution="Check that the account is billed, and that the provider serves the country this service runs in.",
        )
    return None


def _own_words(fault: Fault, texts: Sequence[str], optional: Collection[str]) -> str:
    """The message in lower case, without quotes of the texts."""
    message = fault.message.lower()
    fields = {_normalized(name) for name in optional}
    heard = (
        _TOO_LARGE.search(message),
        _UNKNOWN_MODEL.search(message),
        _NAN in message,
        stated_text_limit(message),
        stated_request_limit(message),
    )
    if any(heard) or any(_field_of(name, fields) for name in _NAME.findall(message)):
        return without_quotes(fault.message, texts, keep=[name.lower() for name in optional])
    return message


def _is_too_large(words: str, codes: Iterable[str]) -> bool:
    return bool(_TOO_LARGE.search(f"{words} {' '.join(codes)}"))


def _refused_field(
    status: int, parameters: Sequence[str], words: str, optional: Collection[str]
) -> _RefusedField | None:
    """The optional field that the server does not accept, if the answer is about one."""
    fields = {_normalized(name): name for name in optional}
    for name in _names(parameters):
        if field := _field_of(name, fields):
            return _RefusedField(fields[field], is_certain=True)
    if field := _field_in_words(words, fields, needs_refusal_words=status not in _BAD_REQUESTS):
        return _RefusedField(fields[field], is_certain=False)
    return None


def _field_in_words(words: str, fields: Collection[str], *, needs_refusal_words: bool) -> str | None:
    """The field that the message names; of several, the one next to words such as "unknown field"."""
    named = [(match.start(), field) for match in _NAME.finditer(words) if (field := _field_of(match[0], fields))]
    refusing = _REFUSAL_WORDS.search(words)
    if not named or (needs_refusal_words and not refusing):
        return None
    position = refusing.start() if refusing else 0
    return min(named, key=lambda item: abs(item[0] - position))[1]


def _field_of(name: str, fields: Collection[str]) -> str | None:
    """The field (by normalized names) that this name means: spellings differ in case and underscores."""
    name = _normalized(name)
    if name in fields:
        return name
    meaning = _SYNONYMS.get(name)
    return next((field for field in fields if meaning and _SYNONYMS.get(field, field) == meaning), None)


def _normalized(name: str) -> str:
    return name.replace("_", "").lower()


def _names(parameters: Iterable[str]) -> list[str]:
    return [name for parameter in parameters for name in _NAME.findall(parameter)]


def _is_about_text(parameters: Iterable[str], codes: Iterable[str]) -> bool:
    return bool(_TEXT_PARAMETERS.intersection(map(str.lower, _names(parameters))) or _TEXT_CODES.intersection(codes))


def _is_about_model(parameters: Iterable[str]) -> bool:
    return any(
        [name for name in _NAME.findall(parameter) if name not in _CONTAINERS][:1] == ["model"]
        for parameter in parameters
    )
