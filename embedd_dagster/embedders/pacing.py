"""What every embedder needs to be used hard: limits kept, refusals waited out, the guilty texts of a batch found.

A refused request (429, 5xx, no answer) is sent again, whole, until the provider has answered nothing for
`patience_seconds`. A rejected one (400) is halved until the guilty texts stand alone; the others get their vectors.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from embedd_dagster.core.rows import Vectors
from embedd_dagster.embedders.base import CutText, Embedded, Embedder, EmbedderLimits
from embedd_dagster.embedders.budget import Budget, InProcessBudget
from embedd_dagster.embedders.concurrency import AdaptiveGate
from embedd_dagster.embedders.cutting import byte_count
from embedd_dagster.errors import EmbeddingRateLimited, EmbeddingRejected, EmbeddingUnavailable, TextRejected

_SLICE_SECONDS = 0.1
_LONGEST_RETRY_AFTER_SECONDS = 120.0  # some providers name hours; it may be over long before
_LONGEST_BACKOFF_SECONDS = 15.0
_SHORTEST_BASE_SECONDS, _LONGEST_BASE_SECONDS = 0.01, 1.0
_FAILURES_OF_A_GUILTY_BATCH = 6
_FAILURES_OF_A_GUILTY_TEXT = 10
_SUSPICIOUS_REJECTIONS = 32
_PROBE_TEXT = "embedd"


class PacedResult(NamedTuple):
    """What became of a batch of n texts.

    `vectors` is float32 of shape (n, dimensions), with NaN for the texts in `failed`; (n, 0) where all of them failed.
    """

    vectors: Vectors
    failed: dict[int, TextRejected]
    """By index of the text."""
    tokens: int
    requests: int
    """Sent for this batch, refused ones included."""


@dataclass(slots=True)
class PacingCounters:
    """What pacing did, for the metadata of a run."""

    requests: int = 0
    retries: int = 0
    rate_limited: int = 0
    texts: int = 0
    """Texts that got a vector."""
    tokens: int = 0
    seconds_waited: float = 0.0
    """Over all threads: for the provider's permission, or for it to come back."""


@dataclass(slots=True)
class _Work:
    """One batch while it is worked on."""

    texts: Sequence[str]
    parts: list[tuple[int, Vectors]] = field(default_factory=list)
    failed: dict[int, TextRejected] = field(default_factory=dict)
    tokens: int = 0
    requests: int = 0
    is_provider_cleared: bool = False


def _never_stop() -> None:
    pass


class PacedEmbedder:
    """An embedder within its account's limits. Safe to use from several threads: they share limits and experience.

    `limits` are those of the embedding provider; `budget` stands in for their per-minute numbers where these hold across
    processes. `check` is called several times a second during every wait, and ends it by raising (RunCancelled).
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
        self._embedder = embedder
        wanted = (limits or {}).get("concurrency") or embedder.limits.concurrency
        self._gate = AdaptiveGate(min(wanted, embedder.limits.concurrency))
        self._budget = budget or InProcessBudget.from_limits(limits, clock=clock)
        self._check = check
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._lock = threading.Lock()
        self._counters = PacingCounters()
        self._max_items = embedder.limits.batch.max_items
        self._latency_seconds = 0.2
        self._tokens_per_byte = 0.3
        self._resume_at = self._answered_at = float("-inf")
        self._answers = 0

    @property
    def limits(self) -> EmbedderLimits:
        """What the provider takes."""
        return self._embedder.limits

    @property
    def concurrency(self) -> int:
        """How many requests may be in flight at present: it follows the provider's refusals."""
        return self._gate.limit

    @property
    def counters(self) -> PacingCounters:
        """What was done so far: a copy."""
        with self._lock:
            return replace(self._counters)

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit."""
        return self._embedder.cut(text)

    def embed(self, texts: Sequence[str]) -> PacedResult:
        """The vectors of these texts, and which of them the provider refuses. Blocks until there is an answer for each.

        Raises EmbeddingRejected when every text would fail; EmbeddingUnavailable when the provider has answered nothing
        for the whole patience; and what `check` raises.
        """
        work = _Work(texts)
        position = 0
        while position < len(texts):
            end = min(position + self._max_items, len(texts))
            self._embed_range(work, position, end)
            position = end
        return PacedResult(_join(work), work.failed, work.tokens, work.requests)

    def close(self) -> None:
        """Closes the embedder."""
        self._embedder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _embed_range(self, work: _Work, start: int, end: int) -> bool:
        """Whether every text from `start` to `end` got its vector."""
        try:
            embedded = self._request(work, work.texts[start:end])
        except TextRejected as error:
            if end - start == 1:
                work.failed[start] = error
                self._suspect_provider(work)
                return False
            middle = (start + end) // 2
            left = self._embed_range(work, start, middle)
            right = self._embed_range(work, middle, end)
            if left and right and error.details.get("too_large"):
                # the batch was at fault, not a text: a server that takes less than its protocol says
                self._max_items = min(self._max_items, end - middle)
            return left and right
        work.parts.append((start, embedded.vectors))
        work.tokens += embedded.tokens
        return True

    def _suspect_provider(self, work: _Work) -> None:
        """Raises EmbeddingRejected if so many texts, and nothing but them, failed that a harmless one would too."""
        if work.parts or work.is_provider_cleared or len(work.failed) < _SUSPICIOUS_REJECTIONS:
            return
        try:
            self._request(work, [_PROBE_TEXT])
        except TextRejected as error:
            raise EmbeddingRejected(
                f"The provider refuses every text: the first {len(work.failed)} of a batch, and a harmless one. "
                f"It says: {error.message}",
                resolution="Check the vector table's embedding_model and the account behind the embedding provider.",
            ) from None
        work.is_provider_cleared = True

    def _request(self, work: _Work, texts: Sequence[str]) -> Embedded:
        """One answer, however often it must be asked for. Raises as `embed` does, and TextRejected."""
        size = sum(map(byte_count, texts))
        failures = 0
        failing_since = 0.0
        answers_before = self._answers
        while True:
            try:
                return self._send(work, texts, size)
            except EmbeddingUnavailable as error:
                now = self._clock()
                failures += 1
                if failures == 1:
                    failing_since, answers_before = now, self._answers
                is_refused = isinstance(error, EmbeddingRateLimited)
                self._note_failure(is_refused=is_refused)
                if not is_refused and self._is_guilty(len(texts), failures, self._answers - answers_before):
                    raise TextRejected(
                        f"The provider failed {failures} times on this text while it answered for others "
                        f"({error.message})"
                    ) from None
                silence = now - max(failing_since, self._answered_at)
                delay = self._delay_seconds(error, failures, silence)
                if silence + delay > self._patience_seconds:
                    raise
                if is_refused and error.retry_after_seconds:
                    # it holds for the account: what others would send meanwhile would be refused as well
                    self._resume_at = max(self._resume_at, now + delay)
                with self._lock:
                    self._counters.retries += 1
                self._wait(delay)

    def _send(self, work: _Work, texts: Sequence[str], size: int) -> Embedded:
        self._check()
        self._gate.enter(self._check)
        refused: bool | None = None
        try:
            while (pause := self._resume_at - self._clock()) > 0:
                # not all of them at the same instant
                self._wait(pause + self._jitter() * self._latency_seconds)
            self._wait(self._budget.acquire(1, round(size * self._tokens_per_byte)))
            work.requests += 1
            started_at = self._clock()
            embedded = self._embedder.embed_documents(texts)
            self._note_answer(embedded, len(texts), size, started_at)
            refused = False
        except EmbeddingUnavailable:
            refused = True
            raise
        except TextRejected:
            refused = False
            self._note_request()
            raise
        finally:
            self._gate.leave(refused=refused)
        return embedded

    def _delay_seconds(self, error: EmbeddingUnavailable, failures: int, silence_seconds: float) -> float:
        """Exponential backoff with full jitter; the provider's own word goes before it.

        It starts below the time of an answer, and hardly grows while others are answered: then this batch was unlucky, and
        would fall behind for nothing. How long nobody was answered is what an outage is known by.
        """
        base = min(max(self._latency_seconds / 2, _SHORTEST_BASE_SECONDS), _LONGEST_BASE_SECONDS)
        longest = min(max(4 * base, silence_seconds), _LONGEST_BACKOFF_SECONDS)
        backoff = self._jitter() * min(base * 2.0 ** min(failures - 1, 20), longest)
        if error.retry_after_seconds is None:
            return backoff
        wanted = min(max(error.retry_after_seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS)
        # a provider that says "at once" and refuses again is not asked without end
        return wanted if failures == 1 else max(wanted, backoff)

    def _is_guilty(self, text_count: int, failures: int, answers_meanwhile: int) -> bool:
        """Whether a 5xx is rather the fault of these texts: they fail again and again while others are answered."""
        allowed = _FAILURES_OF_A_GUILTY_TEXT if text_count == 1 else _FAILURES_OF_A_GUILTY_BATCH
        return failures >= allowed and answers_meanwhile >= allowed

    def _note_request(self) -> None:
        with self._lock:
            self._counters.requests += 1

    def _note_failure(self, *, is_refused: bool) -> None:
        with self._lock:
            self._counters.requests += 1
            self._counters.rate_limited += is_refused

    def _note_answer(self, embedded: Embedded, text_count: int, size: int, started_at: float) -> None:
        with self._lock:
            now = self._clock()
            self._answers += 1
            self._answered_at = now
            self._latency_seconds += 0.2 * (now - started_at - self._latency_seconds)
            if size:
                self._tokens_per_byte += 0.2 * (embedded.tokens / size - self._tokens_per_byte)
            self._counters.requests += 1
            self._counters.texts += text_count
            self._counters.tokens += embedded.tokens

    def _wait(self, seconds: float) -> None:
        """Waits in slices, so that a request to stop is heard."""
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


def _join(work: _Work) -> Vectors:
    if len(work.parts) == 1 and not work.failed:
        return work.parts[0][1]
    dimensions = work.parts[0][1].shape[1] if work.parts else 0
    vectors = np.full((len(work.texts), dimensions), np.nan, dtype=np.float32)
    for start, part in work.parts:
        vectors[start : start + len(part)] = part
    return vectors
