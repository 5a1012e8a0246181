"""Texts cut at OpenAI's token limits by its own tokenizer, if the package `bpe-openai` is installed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from embedd_dagster.core.text_cutting import CutText, byte_count, cut_at_bytes

_MAX_CHARACTERS: Final = 900_000  # bpe-openai refuses a million
_PREFIX_SLACK_TOKENS: Final = 16


def cut_at_tokens(text: str, max_tokens: int, encoding: str) -> CutText:
    """The text cut between two tokens of one of OpenAI's encodings, such as `cl100k_base`.

    Its tokens are an upper bound of the true count and of OpenAI's own estimate for a request, bytes / 4.
    Without the tokenizer's package it is cut by bytes.
    """
    size = byte_count(text)
    if size <= max_tokens:
        return CutText(text, size, truncated=False)
    tokenizer = _tokenizer(encoding)
    if tokenizer is None:
        return cut_at_bytes(text, max_tokens)
    tokens, whole = _encode_prefix(tokenizer, text, max_tokens)
    if whole and len(tokens) <= max_tokens:
        return CutText(text, max(len(tokens), -(-size // 4)), truncated=False)
    keep = min(len(tokens), max_tokens)
    while True:
        # a token may end within a character; what is left of that is dropped
        kept = tokenizer.decode_bytes(tokens[:keep]).decode("utf-8", "ignore")
        count = len(tokenizer.encode_ordinary(kept))
        if count <= max_tokens:
            return CutText(kept, max(count, -(-byte_count(kept) // 4)), truncated=True)
        keep -= count - max_tokens  # at the new end words may fall into more tokens than before


def _encode_prefix(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], bool]:
    """The tokens of enough of the text to cut it, and whether that was all of it."""
    length = 8 * max_tokens
    while True:
        length = min(length, _MAX_CHARACTERS)
        prefix = text[:length]
        tokens: list[int] = tokenizer.encode_ordinary(prefix)
        whole = len(prefix) == len(text)
        if whole or len(tokens) > max_tokens + _PREFIX_SLACK_TOKENS or length == _MAX_CHARACTERS:
            return tokens, whole
        length *= 4


@lru_cache(maxsize=4)
def _tokenizer(encoding: str) -> Any | None:
    # loading takes 35 MB and half a second: only when a text needs it
    try:
        import bpe_openai
    except ImportError:
        return None
    return bpe_openai.get_encoding(encoding)
