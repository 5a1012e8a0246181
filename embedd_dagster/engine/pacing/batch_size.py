"""The size of a request: it shrinks when a request is too large or too slow, and grows back slowly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

_ANSWERS_AFTER_TIMEOUT: Final = 8
_ANSWERS_AFTER_REFUSAL: Final = 64
"""A server that refuses a request as too large most likely has a fixed limit, and each larger try costs a request."""
_MOST_ANSWERS: Final = 4096
_GROWTH: Final = 1.25
_SLOW: Final = 0.25
"""A request that takes more than this part of its timeout does not get larger."""


class BatchSize:
    """The texts and tokens that one request may contain at present. Safe to use from several threads."""

    def __init__(self, max_items: int, max_tokens: int | None, *, timeout_seconds: float) -> None:
        """`max_tokens` None: requests are packed by items only, until the provider states a limit of tokens."""
        self._timeout_seconds = timeout_seconds
        self._most_items = self._items = max_items
        self._tokens = max_tokens
        self._lock = threading.Lock()
        self._full_answers = 0
        self._answers_to_grow = 0

    @property
    def max_items(self) -> int:
        """The number of texts that one request may contain at present."""
        return self._items

    def split(self, indexes: Sequence[int], tokens_of: Callable[[int], float]) -> Iterator[Sequence[int]]:
        """Consecutive parts that fit into a request; a text over the limit is a part by itself.

        Lazy: a size learnt from the request of one part counts for the next.
        """
        start = 0
        while start < len(indexes):
            end = min(start + self._items, len(indexes))
            if self._tokens is not None:
                end = self._end_by_tokens(indexes, start, end, self._tokens, tokens_of)
            yield indexes[start:end]
            start = end

    @staticmethod
    def _end_by_tokens(
        indexes: Sequence[int], start: int, end: int, most: int, tokens_of: Callable[[int], float]
    ) -> int:
        total = 0.0
        for position in range(start, end):
            total += tokens_of(indexes[position])
            if total > most and position > start:
                return position
        return end

    def note_timeout(self, text_count: int) -> None:
        """A request of this many texts was not answered in time."""
        self._shrink_items(text_count // 2, _ANSWERS_AFTER_TIMEOUT)

    def note_too_large(self, text_count: int) -> None:
        """A request was refused as too large, but its halves were accepted; the larger has this many texts."""
        self._shrink_items(text_count, _ANSWERS_AFTER_REFUSAL)

    def note_token_limit(self, tokens: int) -> bool:
        """The provider has stated the most tokens of a request. Whether the number is usable."""
        with self._lock:
            if tokens > 0:
                self._tokens = min(tokens, self._tokens or tokens)
            return tokens > 0

    def note_answer(self, text_count: int, seconds: float) -> None:
        """A request was answered. After enough full and fast ones, the size grows."""
        if self._items >= self._most_items or text_count < self._items:
            return
        with self._lock:
            if seconds > _SLOW * self._timeout_seconds:
                self._full_answers = 0
                return
            self._full_answers += 1
            if self._full_answers >= self._answers_to_grow:
                self._full_answers = 0
                self._items = min(self._most_items, max(self._items + 1, int(self._items * _GROWTH)))

    def _shrink_items(self, most: int, answers_to_grow: int) -> None:
        with self._lock:
            if most < self._items:
                self._items = max(1, most)
                # after each growth that failed, the next one comes later
                self._answers_to_grow = min(max(answers_to_grow, 2 * self._answers_to_grow), _MOST_ANSWERS)
            self._full_answers = 0
