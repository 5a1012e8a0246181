"""Pacing on a clock that stands still unless somebody waits: counts and instants are exact, nothing takes time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from embedd_dagster.engine.pacing.budget import InProcessBudget
from embedd_dagster.engine.pacing.concurrency import AdaptiveGate
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.errors import (
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    RunCancelled,
    TextRejected,
)
from tests.support.memory_embedder import POISON, MemoryEmbedder
from tests.support.openai_server import FATAL, running_openai_server

LATENCY_SECONDS = 0.02


class Clock:
    """A clock for one thread: it moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Provider:
    """A provider whose n-th request (from 1) does what the script says; each takes LATENCY_SECONDS."""

    def __init__(self, clock: Clock, script: Callable[[int, Sequence[str]], Exception | None]) -> None:
        self.clock = clock
        self.script = script
        self.sent_at: list[float] = []

    def __call__(self, texts: Sequence[str]) -> None:
        self.sent_at.append(self.clock.now)
        self.clock.now += LATENCY_SECONDS
        if error := self.script(len(self.sent_at), texts):
            raise error


def pace(
    script: Callable[[int, Sequence[str]], Exception | None] = lambda _number, _texts: None, **options: object
) -> tuple[PacedEmbedder, MemoryEmbedder, Provider]:
    clock = Clock()
    provider = Provider(clock, script)
    embedder = MemoryEmbedder(before_request=provider)
    paced = PacedEmbedder(embedder, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0, **options)  # type: ignore[arg-type]
    return paced, embedder, provider


def texts_of(count: int, *poisoned: int) -> list[str]:
    return [f"text {index}{POISON if index in poisoned else ''}" for index in range(count)]


def test_a_batch_without_failures_is_one_request() -> None:
    paced, embedder, _provider = pace()
    result = paced.embed(texts_of(200))
    assert embedder.requests == [200]
    assert (result.vectors.shape, result.failed, result.requests) == ((200, 8), {}, 1)
    np.testing.assert_array_equal(result.vectors[7], embedder.vector("text 7"))
    assert paced.counters.texts == 200
    assert paced.counters.tokens == result.tokens > 0
    assert paced.counters.seconds_waited == 0


@pytest.mark.parametrize("poisoned", [(0,), (255,), (17, 18), (0, 100, 200, 255), tuple(range(20, 40))])
def test_exactly_the_failing_texts_are_reported(poisoned: tuple[int, ...]) -> None:
    paced, embedder, _provider = pace()
    texts = texts_of(256, *poisoned)
    result = paced.embed(texts)
    assert sorted(result.failed) == list(poisoned)
    assert np.isnan(result.vectors[list(poisoned)]).all()
    for index in set(range(256)) - set(poisoned):
        np.testing.assert_array_equal(result.vectors[index], embedder.vector(texts[index]))
    assert embedder.embedded_count == 256 - len(poisoned)
    assert max(embedder.text_counts.values()) == 1, "nothing is paid for twice"
    assert result.requests == len(embedder.requests) <= 1 + 2 * 8 * len(poisoned)


def test_one_failing_text_costs_two_requests_per_halving() -> None:
    paced, embedder, _provider = pace()
    paced.embed(texts_of(256, 99))
    assert len(embedder.requests) == 1 + 2 * 8


def test_a_provider_that_refuses_every_text_is_detected_early() -> None:
    paced, embedder, _provider = pace(lambda _number, _texts: TextRejected("No."))
    with pytest.raises(EmbeddingRejected, match="every text"):
        paced.embed(texts_of(256))
    assert len(embedder.requests) < 2 * 32 + 16


def test_a_whole_batch_of_failing_texts_does_not_reject_the_provider() -> None:
    paced, embedder, _provider = pace()
    result = paced.embed(texts_of(64, *range(64)))
    assert len(result.failed) == 64
    assert result.vectors.shape == (64, 0)
    assert embedder.embedded_count == 1, "the harmless text that cleared the provider"


def test_a_lower_limit_of_texts_is_learnt_once() -> None:
    def too_many(_number: int, texts: Sequence[str]) -> Exception | None:
        return TextRejected("batch size", too_large=True) if len(texts) > 32 else None

    paced, embedder, _provider = pace(too_many)
    assert paced.embed(texts_of(256)).failed == {}
    before = len(embedder.requests)
    assert paced.embed(texts_of(256)).failed == {}
    assert embedder.requests[before:] == [32] * 8


def test_a_single_too_large_text_does_not_shrink_batches() -> None:
    def too_long(_number: int, texts: Sequence[str]) -> Exception | None:
        return TextRejected("413", too_large=True) if any(POISON in text for text in texts) else None

    paced, embedder, _provider = pace(too_long)
    paced.embed(texts_of(256, 100))
    before = len(embedder.requests)
    paced.embed(texts_of(256))
    assert embedder.requests[before:] == [256]


def test_only_the_probe_text_is_sent_while_the_provider_is_down() -> None:
    paced, embedder, _provider = pace(lambda number, _texts: EmbeddingUnavailable("503") if number <= 4 else None)
    assert paced.embed(texts_of(100)).failed == {}
    assert embedder.requests == [100, 100, 1, 1, 1, 100], "and when that is answered, the batch is sent whole"


@pytest.mark.parametrize("error", [EmbeddingRateLimited("429"), EmbeddingRateLimited("429", retry_after_seconds=2)])
def test_a_refused_batch_is_sent_again_whole(error: EmbeddingUnavailable) -> None:
    paced, embedder, _provider = pace(lambda number, _texts: error if number <= 3 else None)
    result = paced.embed(texts_of(100))
    assert embedder.requests == [100] * 4
    assert result.failed == {}
    assert result.requests == 4
    counters = paced.counters
    assert (counters.requests, counters.retries) == (4, 3)
    assert counters.rate_limited == 3
    assert counters.seconds_waited > 0


def test_retry_after_is_obeyed() -> None:
    error = EmbeddingRateLimited("429", retry_after_seconds=7)
    paced, _embedder, provider = pace(lambda number, _texts: error if number == 1 else None)
    paced.embed(["a"])
    assert 7 <= provider.sent_at[1] - provider.sent_at[0] < 8.5


def test_a_very_long_retry_after_is_capped() -> None:
    error = EmbeddingRateLimited("429", retry_after_seconds=86_400)
    paced, _embedder, provider = pace(lambda number, _texts: error if number == 1 else None)
    paced.embed(["a"])
    assert 120 <= provider.sent_at[1] - provider.sent_at[0] < 125


def test_backoff_grows_to_its_maximum_while_the_provider_does_not_answer() -> None:
    paced, _embedder, provider = pace(lambda number, _texts: EmbeddingUnavailable("down") if number < 14 else None)
    paced.embed(["a"])
    waits = np.diff(provider.sent_at[:14]) - LATENCY_SECONDS
    assert waits[0] < 0.2
    growth = waits[1:] / waits[:-1]
    assert (growth[waits[1:] < 14.9] > 1.5).all()
    assert waits[-1] == pytest.approx(15)


def test_backoff_does_not_grow_while_other_batches_are_answered() -> None:
    clock = Clock()
    provider = Provider(clock, lambda _number, texts: EmbeddingRateLimited("429") if unlucky(texts) else None)
    embedder = MemoryEmbedder(before_request=provider)
    refused_at: list[float] = []

    def unlucky(texts: Sequence[str]) -> bool:
        if list(texts) == ["unlucky"] and len(refused_at) < 12:
            refused_at.append(clock.now)
            return True
        return False

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        paced.embed(["another thread's"])

    paced = PacedEmbedder(embedder, clock=clock, sleep=sleep, jitter=lambda: 1.0)
    assert paced.embed(["unlucky"]).failed == {}
    assert len(refused_at) == 12
    assert np.diff(refused_at).max() < 1


def test_an_outage_longer_than_the_patience_raises() -> None:
    paced, _embedder, provider = pace(lambda _number, _texts: EmbeddingUnavailable("down"), patience_seconds=60)
    with pytest.raises(EmbeddingUnavailable, match="down"):
        paced.embed(texts_of(10))
    assert 40 < provider.sent_at[-1] - provider.sent_at[0] <= 60


def test_an_outage_shorter_than_the_patience_is_survived() -> None:
    clock_start = 1000.0
    paced, embedder, provider = pace(
        lambda _number, _texts: EmbeddingUnavailable("down") if provider.clock.now < clock_start + 30 else None
    )
    assert paced.embed(texts_of(10)).failed == {}
    assert embedder.requests[-1] == 10
    assert provider.sent_at[-1] - clock_start < 30 + 16


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_one_refusal_in_three_costs_less_than_a_fifth_of_the_throughput(retry_after: float | None) -> None:
    paced, embedder, provider = pace(
        lambda number, _texts: None if number % 3 else EmbeddingRateLimited("429", retry_after_seconds=retry_after),
        limits={"concurrency": 8},
    )
    start = provider.clock.now
    for _ in range(300):
        paced.embed(texts_of(10))
    # one thread, so a request after the other: what the provider allows is two of three requests, back to back.
    # jitter is at its worst here (1.0), the mean is half of that
    allowed_seconds = len(embedder.requests) * LATENCY_SECONDS
    assert embedder.embedded_count == 3000
    assert len(embedder.requests) == pytest.approx(450, abs=2)
    waited = provider.clock.now - start - allowed_seconds
    assert waited / 2 <= allowed_seconds * 0.2
    assert paced.concurrency >= 0.8 * 8


def test_concurrency_falls_under_rate_limits_and_recovers() -> None:
    gate = AdaptiveGate(16)

    def answer(*refusals: bool) -> None:
        for refused in refusals:
            gate.enter(lambda: None)
            gate.leave(refused=refused)

    assert gate.limit == 16
    answer(*[True] * 16)
    assert gate.limit == 8
    answer(*[True] * 100)
    assert gate.limit == 1
    answer(*[False] * 4)
    assert gate.limit == 2
    answer(*[False] * 200)
    assert gate.limit == 16


def test_one_refusal_in_three_does_not_change_the_concurrency() -> None:
    gate = AdaptiveGate(64)
    for number in range(5000):
        gate.enter(lambda: None)
        gate.leave(refused=number % 3 == 0)
    assert gate.limit == 64


def test_the_gate_lets_no_more_through_than_its_limit() -> None:
    gate = AdaptiveGate(3)
    inside = most = 0
    lock = threading.Lock()
    barrier = threading.Barrier(3, timeout=10)

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            gate.enter(lambda: None)
            with lock:
                inside += 1
                most = max(most, inside)
            barrier.wait()  # three must be inside at once, or this times out
            with lock:
                inside -= 1
            gate.leave(refused=False)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3

    gate.enter(lambda: None)
    gate.enter(lambda: None)
    gate.enter(lambda: None)
    with pytest.raises(RunCancelled):
        gate.enter(_cancel)


def _cancel() -> None:
    raise RunCancelled("cancelled")


@pytest.mark.parametrize("retry_after", [None, 100.0])
def test_a_request_to_stop_ends_a_wait(retry_after: float | None) -> None:
    is_stopping = False

    def check() -> None:
        if is_stopping:
            _cancel()

    def refuse(number: int, _texts: Sequence[str]) -> Exception:
        nonlocal is_stopping
        is_stopping = number == 4
        return EmbeddingRateLimited("429", retry_after_seconds=retry_after)

    paced, _embedder, provider = pace(refuse, check=check)
    with pytest.raises(RunCancelled):
        paced.embed(["a"])
    assert len(provider.sent_at) == 4
    assert provider.clock.now - provider.sent_at[-1] < 0.3


def test_a_rejection_of_all_texts_is_not_retried() -> None:
    paced, embedder, _provider = pace(lambda _number, _texts: EmbeddingRejected("wrong key"))
    with pytest.raises(EmbeddingRejected, match="wrong key"):
        paced.embed(texts_of(100))
    assert embedder.requests == [100]


def test_a_text_that_breaks_the_provider_is_found_while_others_are_answered() -> None:
    clock = Clock()

    def broken(_number: int, texts: Sequence[str]) -> Exception | None:
        return EmbeddingUnavailable("500") if any(FATAL in text for text in texts) else None

    provider = Provider(clock, broken)
    embedder = MemoryEmbedder(before_request=provider)
    paced: PacedEmbedder

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        # another thread's request, while this one waits
        paced.embed(["harmless"])

    paced = PacedEmbedder(embedder, clock=clock, sleep=sleep, jitter=lambda: 1.0)
    result = paced.embed([*texts_of(7), f"bad {FATAL}"])
    assert list(result.failed) == [7]
    assert "bad" not in result.failed[7].message
    assert not np.isnan(result.vectors[:7]).any()


def test_requests_per_minute_stay_within_the_limit() -> None:
    paced, _embedder, provider = pace(limits={"requests_per_minute": 60})
    for _ in range(200):
        paced.embed(["a"])
    sent = provider.sent_at
    in_any_minute = max(sum(start <= instant < start + 60 for instant in sent) for start in sent)
    assert 58 <= in_any_minute <= 62
    assert sent[-1] - sent[0] == pytest.approx(199, abs=2)


def test_tokens_per_minute_as_counted_by_the_provider_stay_within_the_limit() -> None:
    paced, _embedder, provider = pace(limits={"tokens_per_minute": 60_000})
    batch = ["x" * 100] * 10  # the provider counts 1,000 tokens, one a byte
    for _ in range(150):
        paced.embed(batch)
    late = [instant for instant in provider.sent_at if instant > provider.sent_at[50]]
    # once the first answers have told how many tokens a byte makes, one request a second
    assert (late[-1] - late[0]) / (len(late) - 1) == pytest.approx(1.0, rel=0.03)


def test_a_budget_also_counts_refused_requests() -> None:
    class Recorder:
        requests = 0

        def acquire(self, requests: int, tokens: int) -> float:
            self.requests += requests
            assert tokens > 0
            return 0.5

    budget = Recorder()
    paced, _embedder, _provider = pace(
        lambda number, _texts: EmbeddingRateLimited("429") if number < 3 else None, budget=budget
    )
    paced.embed(texts_of(5))
    assert budget.requests == 3
    assert paced.counters.seconds_waited > 1.5


def test_a_request_above_the_burst_is_sent_and_the_next_one_waits() -> None:
    clock = Clock()
    budget = InProcessBudget(tokens_per_minute=600, clock=clock)
    assert budget.acquire(1, 6000) == 0
    assert budget.acquire(1, 10) == pytest.approx(599)


def test_there_is_no_wait_without_a_limit() -> None:
    budget = InProcessBudget.from_limits({"requests_per_minute": None, "concurrency": 4})
    assert sum(budget.acquire(1, 10**6) for _ in range(1000)) == 0


def test_many_threads_finish_against_a_provider_that_refuses_every_third_request() -> None:
    with running_openai_server(default_dimensions=64, refuse_every=3, latency_seconds=0.002) as server:
        from embedd_dagster.connectors.registry import open_embedder

        credentials = {"base_url": server.base_url}
        with open_embedder("openai", credentials=credentials, model="m", dimensions=64) as embedder:
            paced = PacedEmbedder(embedder, {"concurrency": 8})
            failed = []

            def work(worker: int) -> None:
                for batch in range(20):
                    texts = [f"{worker}-{batch}-{index}" for index in range(10)]
                    failed.append(paced.embed(texts).failed)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        stats = server.stats()
    assert failed == [{}] * 160
    assert stats["texts"] == 1600 + 1, "every text once, and a word that showed which fields the server takes"
    assert stats["max_in_flight"] <= 8
    assert stats["requests"] == pytest.approx(240, abs=2), "no more requests than the refusals make necessary"
    assert paced.concurrency >= 0.8 * 8
