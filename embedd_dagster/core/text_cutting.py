"""Texts cut at a model's token limit, and the number of tokens they count for when a request is packed.

A tokenizer that works on bytes never makes more tokens than the text has bytes. So the bytes are a bound that costs
nothing, and hardly any text is tokenized: only one with more bytes than the limit has tokens. Measured for 1,000 texts of
66 words: 0.07 ms for the bytes, 12 ms for the exact count, which would be a quarter of a core at 20,000 rows/s. The bound
is about four times the count. At 256 texts per request it limits a request only if the texts are above 1,170 bytes, and
such requests are large enough.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# a word, a digit, any other character
_PIECE: Final = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")
_LONG_WORD: Final = 12
_MOST_CHARACTERS_PER_TOKEN: Final = 16
_SPECIAL_TOKENS_DIVISOR: Final = 64


class CutText(NamedTuple):
    """A text within the model's limit."""

    text: str
    tokens: int
    """An estimate. Not below what the provider will count, if that can be known cheaply."""
    truncated: bool


def byte_count(text: str) -> int:
    """The length of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def cut_at_bytes(text: str, max_bytes: int) -> CutText:
    """The text cut at this many bytes, between two characters; its tokens are its bytes."""
    size = byte_count(text)
    if size <= max_bytes:
        return CutText(text, size, truncated=False)
    kept = text.encode()[:max_bytes].decode("utf-8", "ignore")
    return CutText(kept, byte_count(kept), truncated=True)


def cut_at_unknown_tokens(text: str, max_tokens: int) -> CutText:
    """The text cut at the limit of a model whose tokenizer is not known, by an estimate that is mostly too high.

    1/64 of the limit is left for the tokens that the model adds. If bytes were the bound, an English text would lose three
    quarters of what the model can read; with this estimate it loses about a quarter.
    """
    available = max(1, max_tokens - _special_tokens(max_tokens))
    size = byte_count(text)
    if size <= available:
        return CutText(text, size, truncated=False)
    beginning = text[: _MOST_CHARACTERS_PER_TOKEN * available]
    tokens = 0
    for piece in _PIECE.finditer(beginning):
        count = _most_tokens(piece[0])
        if tokens + count > available:
            end = piece.start()
            if len(piece[0]) > _LONG_WORD:
                end += 2 * (available - tokens)
            return CutText(text[:end].rstrip(), available, truncated=True)
        tokens += count
    return CutText(beginning, max(tokens, 1), truncated=len(beginning) < len(text))


def limit_that_keeps(text: str) -> int:
    """A limit at which `cut_at_unknown_tokens` does not cut this text."""
    tokens = sum(_most_tokens(piece[0]) for piece in _PIECE.finditer(text))
    return tokens + _special_tokens(tokens) + 1


def _special_tokens(max_tokens: int) -> int:
    return max(2, max_tokens // _SPECIAL_TOKENS_DIVISOR)


def _most_tokens(piece: str) -> int:
    """An estimate of the tokens of one piece: above what the usual tokenizers count for ordinary text."""
    length = len(piece)
    if "a" <= piece[0].lower() <= "z":
        return (length + 2) // 3 if length <= _LONG_WORD else (length + 1) // 2
    # a character of three bytes or more may be two or three tokens
    return 1 if piece[0] < "\u0800" else 2
