"""Sending requests within an account's limits: how many at once, how many per minute, and when to try again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.text_cutting import byte_count
from embedd_dagster.core.unit_length import to_unit_length
from embedd_dagster.engine.pacing.batch_size import BatchSize
from embedd_dagster.engine.pacing.budget import Budget
from embedd_dagster.engine.pacing.concurrency import AdaptiveGate
from embedd_dagster.errors import EmbeddingRateLimited, EmbeddingUnavailable, TextRejected
from embedd_dagster.protocols.embedder import DEFAULT_TIMEOUT_SECONDS, Embedder

_SLICE_SECONDS = 0.1
_LONGEST_RETRY_AFTER_SECONDS = 120.0  # some providers name hours, but answer again long before
_LONGEST_BACKOFF_SECONDS = 15.0
_SHORTEST_BASE_SECONDS, _LONGEST_BASE_SECONDS = 0.01, 1.0


@dataclass(slots=True)
class PacingCounters:
    """Counts of pacing, for the metadata of a run."""

    requests: int = 0
    retries: int = 0
    rate_limited: int = 0
    texts: int = 0
    """Texts that got a vector."""
    tokens: int = 0
    seconds_waited: float = 0.0
    """Over all threads: for the provider's permission, or for it to come back."""


class Usable(NamedTuple):
    """An answer whose vectors have length 1; `mask` marks the usable ones, None: all."""

    vectors: Vectors
    mask: NDArray[np.bool_] | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """How to wait: `check` is called several times per second, and ends a wait by raising."""

    check: Callable[[], None]
    patience_seconds: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random


class Sender:
    """One embedder's requests. Safe to use from several threads: they share limits and experience."""

    def __init__(self, embedder: Embedder, limits: Mapping[str, int | None], budget: Budget, waiting: Waiting) -> None:
        self._embedder = embedder
        wanted = limits.get("concurrency") or embedder.limits.concurrency
        self._gate = AdaptiveGate(min(wanted, embedder.limits.concurrency))
        # what the first answer reveals need not hit 16 requests at once
        self._gate.start_with_one()
        self._budget = budget
        self._timeout_seconds = float(limits.get("request_timeout_seconds") or DEFAULT_TIMEOUT_SECONDS)
        max_items = min(
            limits.get("max_batch_items") or embedder.limits.batch.max_items, embedder.limits.batch.max_items
        )
        self.size = BatchSize(max_items, _max_request_tokens(limits), timeout_seconds=self._timeout_seconds)
        """The size that one request may have at present."""
        self._check = waiting.check
        self._patience_seconds = waiting.patience_seconds
        self._clock, self._sleep, self._jitter = waiting.clock, waiting.sleep, waiting.jitter
        self._lock = threading.Lock()
        self._counters = PacingCounters()
        self._latency_seconds = 0.2
        self._tokens_per_byte = 0.3
        self._resume_at = self._answered_at = float("-inf")

    @property
    def concurrency(self) -> int:
        """The number of requests that may be in flight at present."""
        return self._gate.limit

    @property
    def counters(self) -> PacingCounters:
        """The counts so far: a copy."""
        with self._lock:
            return replace(self._counters)

    @property
    def has_answered(self) -> bool:
        """Whether the provider has given a usable vector."""
        return self._answered_at > float("-inf")

    def estimate_tokens(self, text: str) -> float:
        """The tokens of a text, estimated from what the provider counted for others."""
        return byte_count(text) * self._tokens_per_byte

    def send(self, texts: Sequence[str]) -> Usable:
        """The answer to one request. Raises as `Embedder` says, and what `check` raises."""
        size = sum(map(byte_count, texts))
        self._check()
        self._gate.enter(self._check)
        refused: bool | None = None
        try:
            while (pause := self._resume_at - self._clock()) > 0:
                # not all of them at the same instant
                self._wait(pause + self._jitter() * self._latency_seconds)
            self._wait(self._budget.acquire(1, round(size * self._tokens_per_byte)))
            with self._lock:
                self._counters.requests += 1
            started_at = self._clock()
            embedded = self._embedder.embed_documents(texts)
            usable = Usable(*to_unit_length(embedded.vectors), embedded.tokens)
            self._note_answer(usable, len(texts), size, started_at)
            refused = False
        except EmbeddingUnavailable:
            refused = True
            raise
        except TextRejected:
            refused = False
            self._gate.open(self._gate.maximum)
            raise
        finally:
            self._gate.leave(refused=refused)
        return usable

    def wait_for_next_try(self, error: EmbeddingUnavailable, failures: int, failing_since: float) -> None:
        """Waits before the next request. Raises the error if the provider has answered nothing for `patience_seconds`."""
        now = self._clock()
        silence = now - max(failing_since, self._answered_at)
        delay = self._delay_seconds(error, failures, silence)
        if silence + delay > self._patience_seconds:
            raise error
        if isinstance(error, EmbeddingRateLimited) and error.retry_after_seconds:
            # it holds for the account: requests of other threads would be refused as well
            self._resume_at = max(self._resume_at, now + delay)
        with self._lock:
            self._counters.retries += 1
            self._counters.rate_limited += isinstance(error, EmbeddingRateLimited)
        self._wait(delay)

    def now(self) -> float:
        """The clock of `wait_for_next_try`."""
        return self._clock()

    def _delay_seconds(self, error: EmbeddingUnavailable, failures: int, silence_seconds: float) -> float:
        """Exponential backoff with full jitter; the provider's own Retry-After has precedence.

        It starts below the latency of an answer, and hardly grows while other requests are answered: then this batch was
        only unlucky. The time without any answer shows an outage.
        """
        base = min(max(self._latency_seconds / 2, _SHORTEST_BASE_SECONDS), _LONGEST_BASE_SECONDS)
        longest = min(max(4 * base, silence_seconds), _LONGEST_BACKOFF_SECONDS)
        backoff = self._jitter() * min(base * 2.0 ** min(failures - 1, 20), longest)
        if error.retry_after_seconds is None:
            return backoff
        wanted = min(max(error.retry_after_seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS)
        # a provider that says "at once" and refuses again is not asked endlessly
        return wanted if failures == 1 else max(wanted, backoff)

    def _note_answer(self, usable: Usable, text_count: int, size: int, started_at: float) -> None:
        usable_count = text_count if usable.mask is None else int(usable.mask.sum())
        with self._lock:
            now = self._clock()
            seconds = now - started_at
            if usable_count:
                self._answered_at = now
            self._latency_seconds += 0.2 * (seconds - self._latency_seconds)
            if size:
                self._tokens_per_byte += 0.2 * (usable.tokens / size - self._tokens_per_byte)
            self._counters.texts += usable_count
            self._counters.tokens += usable.tokens
        self.size.note_answer(text_count, seconds)
        # if the server handles one request after the other, no more than these are answered in time
        self._gate.open(int(self._timeout_seconds / max(seconds, 1e-3)))

    def _wait(self, seconds: float) -> None:
        """Waits in slices, so that `check` can stop the wait."""
        if seconds <= 0:
            return
        until = self._clock() + seconds
        try:
            while (left := until - self._clock()) > 0:
                self._check()
                self._sleep(min(left, _SLICE_SECONDS))
        finally:
            with self._lock:
                self._counters.seconds_waited += seconds - max(0.0, until - self._clock())


def _max_request_tokens(limits: Mapping[str, int | None]) -> int | None:
    """The most tokens of a request within the limit of a batch and the account's limit per minute."""
    given = [number for name in ("max_batch_tokens", "tokens_per_minute") if (number := limits.get(name))]
    return min(given, default=None)
