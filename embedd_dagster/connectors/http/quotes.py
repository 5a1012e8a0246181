"""Removes from a server's message the texts of the request that it quotes.

A refusal may quote a text whole or in part, cut short, escaped for JSON or HTML, or in another case. Words are compared
instead of characters, so escapes, blanks and punctuation make no difference.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

_LONGEST_MESSAGE: Final = 20_000
# a letter outside ASCII counts as a word: many scripts do not separate words
_WORD = re.compile(r"[0-9a-z_]+|[^\W0-9a-z_]")
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|[nrtbf])")
_OPENING = re.compile(r"['\"`“”‘’«\[(:=]\s*$")
_QUOTE = re.compile(r"['\"`“”‘’«»]")
_ELLIPSIS = re.compile(r"\W{0,2}(\.\.\.|…)")
_RUN: Final = 3
"""This many consecutive words of a text are a quote at any place of the message."""


def without_quotes(message: str, texts: Iterable[str], keep: Collection[str] = ()) -> str:
    """The message in lower case, with blanks in place of the quoted texts.

    A text that consists of one of the words in `keep` (names of parameters) is not treated as a quote.
    """
    found = _Message(_fold(message[:_LONGEST_MESSAGE]))
    for text in texts:
        words = _WORD.findall(_fold(text))
        if len(words) > 1 or (words and words[0] not in keep):
            found.mark(words)
    return found.unquoted()


class _Message:
    def __init__(self, text: str) -> None:
        self._text = text
        self._spans = [match.span() for match in _WORD.finditer(text)]
        self._words = [text[start:end] for start, end in self._spans]
        self._quoted = [False] * len(self._words)
        self._places = defaultdict[str, list[int]](list)
        self._runs = defaultdict[tuple[str, ...], list[int]](list)
        for place, word in enumerate(self._words):
            self._places[word].append(place)
            self._runs[tuple(self._words[place : place + _RUN])].append(place)

    def mark(self, words: list[str]) -> None:
        """Marks the words that the message quotes from a text."""
        self._mark_beginning(words)
        for index, run in enumerate(zip(words, words[1:], words[2:], strict=False)):
            for place in self._runs.get(run, ()):
                self._mark(place, place + _RUN)
                self._mark_cut_words(words, index, place)

    def unquoted(self) -> str:
        pieces, position = [], 0
        for (start, end), is_quoted in zip(self._spans, self._quoted, strict=True):
            if is_quoted:
                pieces += [self._text[position:start], " " * (end - start)]
                position = end
        return "".join((*pieces, self._text[position:]))

    def _mark(self, start: int, end: int) -> None:
        self._quoted[start:end] = [True] * (end - start)

    def _mark_cut_words(self, words: list[str], index: int, place: int) -> None:
        """The quote may begin and end within a word."""
        after, before = place + _RUN, place - 1
        if after < len(self._words) and "".join(words[index + _RUN : index + _RUN + 1]).startswith(self._words[after]):
            self._quoted[after] = True
        if before >= 0 and "".join(words[max(index - 1, 0) : index]).endswith(self._words[before]):
            self._quoted[before] = True

    def _mark_beginning(self, words: list[str]) -> None:
        """Marks a whole short text, or the first words of a text if they look like a quote."""
        for place in self._places.get(words[0], ()):
            length = self._length_of_match(words, place)
            is_whole = length == len(words)
            if not is_whole and "".join(self._words[place + length : place + length + 1]) in _beginnings(words[length]):
                length += 1
            if is_whole or self._is_cut_quote(place, length):
                self._mark(place, place + length)

    def _length_of_match(self, words: list[str], place: int) -> int:
        length = 0
        for given, wanted in zip(self._words[place:], words, strict=False):
            if given != wanted:
                break
            length += 1
        return length

    def _is_cut_quote(self, place: int, length: int) -> bool:
        start, end = self._spans[place][0], self._spans[place + length - 1][1]
        if not _OPENING.search(self._text, max(0, start - 8), start) or _QUOTE.search(self._text, start, end):
            return False
        # one word in quotes may be the name of a parameter
        return length > 1 or bool(_ELLIPSIS.match(self._text, end))


def _beginnings(word: str) -> set[str]:
    return {word[:length] for length in range(1, len(word))}


def _fold(text: str) -> str:
    """The text without escapes and in lower case: the same for all notations of it."""
    if "\\" in text:
        # escaped surrogates are joined to the character that they stand for
        text = _ESCAPE.sub(_unescape, text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "&" in text:
        text = html.unescape(text)
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else " "
