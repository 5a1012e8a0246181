"""Limits that a provider states when it refuses: tokens of one text, and tokens of one request."""

from __future__ import annotations

import re
from typing import Any, Final

_LEAST_TOKENS: Final = 16
"""A smaller number is not the limit of any model."""
_LONGEST_PREFIX: Final = 300
"""Only the beginning of a message is read: the rest may quote a text."""

# vLLM, OpenAI and LiteLLM; Text Embeddings Inference; llama.cpp
_TEXT_LIMIT: Final = re.compile(
    r"context length is (?:only )?(\d{1,9})\b"
    r"|must have less than (\d{1,9}) tokens"
    r"|too large to process.{0,80}current batch size: (\d{1,9})",
    re.I | re.S,
)
# Ollama and llama.cpp do not state the number
_TEXT_TOO_LONG: Final = re.compile(
    r"input length exceeds (?:the |maximum )?context length|exceeds the available context size"
    r"|input is too large to process",
    re.I,
)
_REQUEST_LIMIT: Final = re.compile(r"request too large.*?\bLimit:? (\d{1,12})\b", re.I | re.S)


def stated_text_limit(message: str) -> dict[str, Any]:
    """Details for a TextRejected: `max_input_tokens` if the message states it, only `too_long` if it does not; or none."""
    beginning = message[:_LONGEST_PREFIX]
    if found := _TEXT_LIMIT.search(beginning):
        tokens = int(next(number for number in found.groups() if number))
        if tokens >= _LEAST_TOKENS:
            return {"too_long": True, "max_input_tokens": tokens}
    return {"too_long": True} if _TEXT_TOO_LONG.search(beginning) else {}


def stated_request_limit(message: str) -> dict[str, Any] | None:
    """Details for a TextRejected if a 429 says that the request itself is too large, so waiting does not help."""
    beginning = message[:_LONGEST_PREFIX]
    if not beginning.lower().startswith("request too large"):
        return None
    found = _REQUEST_LIMIT.search(beginning)
    return {"too_large": True} | ({"max_request_tokens": int(found[1])} if found else {})
