"""Makes a raw embedder usable under load: keeps limits, waits after refusals, finds the failing texts of a batch.

A refused request (429) is sent again, whole, until the provider has answered nothing for `patience_seconds`.
`batch_run.py` handles all other failures, `sending.py` paces the requests, `batch_size.py` decides their size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.text_cutting import CutText, cut_at_unknown_tokens
from embedd_dagster.engine.pacing.batch_run import BatchRun
from embedd_dagster.engine.pacing.budget import Budget, InProcessBudget
from embedd_dagster.engine.pacing.sending import PacingCounters, Sender, Waiting
from embedd_dagster.errors import TextRejected
from embedd_dagster.protocols.embedder import Embedder, EmbedderLimits


class PacedResult(NamedTuple):
    """The outcome of a batch of n texts.

    `vectors` is float32 of shape (n, dimensions), each of length 1, with NaN for the texts in `failed`; (n, 0) if all failed.
    """

    vectors: Vectors
    failed: dict[int, TextRejected]
    """By index of the text."""
    tokens: int
    requests: int
    """Sent for this batch, including refused ones."""
    cut: dict[int, str]
    """By index: the rest of texts that the provider refused as too long and that were cut here."""


def _never_stop() -> None:
    pass


class PacedEmbedder:
    """An embedder within its account's limits. Safe to use from several threads: they share limits and experience.

    `limits` are those of the embedding provider; `budget` replaces their per-minute numbers if these hold across
    processes. `check` is called several times per second during every wait, and ends it by raising (RunCancelled).
    """

    def __init__(
        self,
        embedder: Embedder,
        limits: Mapping[str, int | None] | None = None,
        *,
        budget: Budget | None = None,
        check: Callable[[], None] = _never_stop,
        patience_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        limits = limits or {}
        self._embedder = embedder
        budget = budget or InProcessBudget.from_limits(limits, clock=clock)
        waiting = Waiting(check, patience_seconds, clock, sleep, jitter)
        self._sender = Sender(embedder, limits, budget, waiting)
        batch = replace(embedder.limits.batch, max_items=self._sender.size.max_items)
        self._limits = replace(embedder.limits, batch=batch)
        self._stated_max_tokens: int | None = None

    @property
    def limits(self) -> EmbedderLimits:
        """What the provider accepts, within the limits of the account."""
        return self._limits

    @property
    def concurrency(self) -> int:
        """The number of requests that may be in flight at present: it follows the provider's refusals."""
        return self._sender.concurrency

    @property
    def counters(self) -> PacingCounters:
        """The counts so far: a copy."""
        return self._sender.counters

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit, or at the lower one that the provider has stated since."""
        cut = self._embedder.cut(text)
        if self._stated_max_tokens is None:
            return cut
        shorter = cut_at_unknown_tokens(cut.text, self._stated_max_tokens)
        return shorter._replace(truncated=cut.truncated or shorter.truncated)

    def _shorten(self, text: str, stated_max_tokens: int | None) -> str:
        if stated_max_tokens is not None:
            self._stated_max_tokens = min(stated_max_tokens, self._stated_max_tokens or stated_max_tokens)
        return self.cut(text).text

    def embed(self, texts: Sequence[str]) -> PacedResult:
        """The vectors of these texts, and those that the provider refuses. Blocks until each text has an answer.

        Raises EmbeddingRejected when every text would fail; EmbeddingUnavailable when the provider has answered nothing
        for `patience_seconds`; and what `check` raises.
        """
        run = BatchRun(self._sender, texts, self._shorten)
        run.embed()
        return PacedResult(run.vectors(), run.failed, run.tokens, run.requests, run.cut)

    def close(self) -> None:
        """Closes the embedder."""
        self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
