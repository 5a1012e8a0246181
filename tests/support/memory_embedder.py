"""An embedder in memory: deterministic vectors, counted texts, and scripted faults."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from types import TracebackType
from typing import Self

import numpy as np

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.core.text_cutting import CutText, cut_at_bytes
from embedd_dagster.errors import TextRejected
from embedd_dagster.protocols.embedder import Embedded, EmbedderLimits

POISON = "☠POISON☠"


class MemoryEmbedder:
    """Vectors of length 1 by the hash of the text; a text with `POISON` in it is rejected.

    `before_request` is called with the texts of each request, and may raise a provider's errors.
    """

    def __init__(
        self,
        dimensions: int = 8,
        *,
        max_items: int = 256,
        max_tokens_per_text: int = 8192,
        concurrency: int = 8,
        before_request: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.limits = EmbedderLimits(BatchLimits(max_items, 300_000), max_tokens_per_text, concurrency)
        self.dimensions = dimensions
        self.before_request = before_request
        self.requests: list[int] = []
        """The number of texts of each request, including refused ones."""
        self.text_counts: Counter[str] = Counter()
        """How often each text got a vector, and was paid for."""
        self.is_closed = False
        self._lock = threading.Lock()

    @property
    def embedded_count(self) -> int:
        """How many texts got a vector."""
        return self.text_counts.total()

    def cut(self, text: str) -> CutText:
        return cut_at_bytes(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        with self._lock:
            self.requests.append(len(texts))
        if self.before_request:
            self.before_request(texts)
        if any(POISON in text for text in texts):
            raise TextRejected("The provider refuses the text.")
        with self._lock:
            self.text_counts.update(texts)
        return Embedded(np.stack([self.vector(text) for text in texts]), sum(len(text) for text in texts))

    def embed_query(self, text: str) -> Vectors:
        return self.vector(text)

    def vector(self, text: str) -> Vectors:
        """The vector of a text, without counting it."""
        seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        vector = np.random.default_rng(seed).standard_normal(self.dimensions).astype(np.float32)
        return vector / np.linalg.norm(vector)

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
