"""Texts that a provider cannot embed, with a server like those that users write: Flask behind gunicorn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.engine.question import embed_question
from embedd_dagster.errors import EmbeddingRejected, TextRejected
from tests.support.flask_provider import DIMENSIONS, FlaskProvider, running_flask_provider

Open = Callable[..., PacedEmbedder]
KNOWN_MODEL = "text-embedding-3-small"


@pytest.fixture(scope="module")
def running() -> Iterator[FlaskProvider]:
    with running_flask_provider() as provider:
        yield provider


@pytest.fixture
def provider(running: FlaskProvider) -> FlaskProvider:
    running.forget()
    return running


@pytest.fixture
def open_paced(provider: FlaskProvider) -> Iterator[Open]:
    opened = []

    def build(server: str = "plain", *, model: str = KNOWN_MODEL, **limits: int) -> PacedEmbedder:
        credentials = {"base_url": provider.base_url(server)}
        raw = open_embedder("openai", credentials=credentials, model=model, dimensions=DIMENSIONS, limits=limits)
        opened.append(PacedEmbedder(raw, limits, patience_seconds=60))
        return opened[-1]

    yield build
    for paced in opened:
        paced.close()


def texts_with(word: str, count: int, *positions: int) -> list[str]:
    return [f"shelf {index}{' ' + word if index in positions else ''}" for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 40, 256])
@pytest.mark.parametrize("word", ["ERROR500", "GARBAGE", "DROPPED", "FORBIDDEN"])
def test_only_the_text_without_a_usable_answer_fails(
    provider: FlaskProvider, open_paced: Open, word: str, count: int
) -> None:
    failing = count // 2
    texts = texts_with(word, count, failing)
    result = open_paced().embed(texts)
    assert list(result.failed) == [failing]
    assert word not in result.failed[failing].message
    if count > 1:
        assert np.isfinite(np.delete(result.vectors, failing, axis=0)).all()
    requests = provider.seen()
    assert len(requests) == result.requests
    extra_requests = len(requests) - 1
    assert extra_requests <= (2 * math.ceil(math.log2(count)) + 3 if count > 2 else 6)
    assert sum(request == texts for request in requests) <= (2 if count > 2 else 5), (
        "a batch is not paid for again and again"
    )


@pytest.mark.parametrize("word", ["NAN", "INFINITY", "ZEROS", "TINY", "SHORT"])
def test_only_the_text_of_an_unusable_vector_is_sent_again(
    provider: FlaskProvider, open_paced: Open, word: str
) -> None:
    texts = texts_with(word, 40, 17, 30)
    result = open_paced().embed(texts)
    assert sorted(result.failed) == [17, 30]
    assert provider.seen() == [texts, [texts[17], texts[30]]]
    assert np.linalg.norm(np.delete(result.vectors, [17, 30], axis=0), axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("word", ["NAN", "ZEROS", "SHORT"])
def test_a_single_text_with_an_unusable_vector_fails(open_paced: Open, word: str) -> None:
    result = open_paced().embed([f"shelf {word}"])
    assert list(result.failed) == [0]
    assert result.requests <= 6


def test_a_whole_batch_of_unusable_vectors_is_not_halved(provider: FlaskProvider, open_paced: Open) -> None:
    result = open_paced().embed(texts_with("ZEROS", 40, *range(40)))
    assert len(result.failed) == 40
    assert "direction" in result.failed[0].message
    assert [len(request) for request in provider.seen()] == [40, 40, 1]


def test_huge_vectors_are_scaled_to_length_one(open_paced: Open) -> None:
    texts = texts_with("HUGE", 40, *range(40))
    huge = open_paced().embed(texts)
    assert huge.failed == {}
    assert np.linalg.norm(huge.vectors.astype(np.float64), axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("server", "words"), [("zeros", "direction"), ("nonsense", "does not follow the embeddings protocol")]
)
def test_a_provider_without_any_usable_answer_is_rejected_immediately(
    provider: FlaskProvider, open_paced: Open, server: str, words: str
) -> None:
    with pytest.raises(EmbeddingRejected, match=words):
        open_paced(server).embed(texts_with("", 40))
    assert len(provider.seen()) <= 6


def test_a_provider_that_forbids_every_text_is_a_refused_key(provider: FlaskProvider, open_paced: Open) -> None:
    with pytest.raises(EmbeddingRejected, match="api_key"):
        open_paced("forbidden").embed(texts_with("", 40))
    assert [len(request) for request in provider.seen()] == [40, 1]


def test_only_the_text_that_hangs_the_server_fails(provider: FlaskProvider, open_paced: Open) -> None:
    result = open_paced(request_timeout_seconds=1).embed(texts_with("HANG", 8, 5))
    assert list(result.failed) == [5]
    assert len(provider.seen()) - 1 <= 2 * 3 + 3


def test_batches_shrink_until_a_slow_server_answers_in_time(provider: FlaskProvider, open_paced: Open) -> None:
    paced = open_paced("slow", request_timeout_seconds=1)
    result = paced.embed(texts_with("", 256))  # two seconds of work
    assert result.failed == {}
    before = len(provider.seen())
    assert paced.embed(texts_with("again", 64, *range(64))).failed == {}
    assert max(len(request) for request in provider.seen()[before:]) <= 64


@pytest.mark.parametrize("server", ["vllm", "tei", "ollama"])
def test_a_text_above_the_limit_that_the_server_states_is_cut(
    provider: FlaskProvider, open_paced: Open, server: str
) -> None:
    paced = open_paced(server)
    texts = texts_with("long " * 200, 40, 7, 21)
    result = paced.embed(texts)
    assert result.failed == {}
    assert sorted(result.cut) == [7, 21]
    assert all(texts[index].startswith(kept) for index, kept in result.cut.items())
    assert min(len(kept.split()) for kept in result.cut.values()) >= 20, "most of what the model can read is kept"
    cut = paced.cut(texts[7])
    assert cut.truncated, "the limit is known from now on"
    before = len(provider.seen())
    assert paced.embed([cut.text]).failed == {}
    assert len(provider.seen()) == before + 1


def test_a_configured_limit_cuts_rows_before_they_are_sent(provider: FlaskProvider, open_paced: Open) -> None:
    paced = open_paced("vllm", model="bge-small-en", max_input_tokens=64)
    cut = paced.cut("long " * 200)
    assert cut.truncated
    assert len(cut.text.split()) >= 20
    assert not paced.cut("a few words").truncated
    assert paced.embed([cut.text]).failed == {}
    assert len(provider.seen()) == 1


def test_a_request_too_large_for_the_account_is_split_without_a_wait(provider: FlaskProvider, open_paced: Open) -> None:
    paced = open_paced("small-account")
    texts = [f"{index} " + "word " * 80 for index in range(256)]  # some 26,000 tokens
    result = paced.embed(texts)
    assert result.failed == {}
    assert paced.counters.rate_limited == 0
    answered = 256 // 19
    assert len(provider.seen()) <= 3 * answered


def test_requests_are_packed_within_the_tokens_per_minute(provider: FlaskProvider, open_paced: Open) -> None:
    paced = open_paced("small-account", max_batch_tokens=1900)
    texts = [f"{index} " + "word " * 80 for index in range(64)]
    assert paced.embed(texts).failed == {}
    assert sum(map(len, provider.seen())) == 64, "nothing was refused"


def test_a_batch_contains_no_more_texts_than_configured(provider: FlaskProvider, open_paced: Open) -> None:
    paced = open_paced(max_batch_items=10)
    assert paced.limits.batch.max_items == 10
    paced.embed(texts_with("", 25))
    assert [len(request) for request in provider.seen()] == [10, 10, 5]


@pytest.mark.parametrize("word", ["NAN", "ZEROS"])
def test_a_question_with_an_unusable_vector_is_a_clear_error(provider: FlaskProvider, word: str) -> None:
    credentials = {"base_url": provider.base_url()}
    with (
        open_embedder("openai", credentials=credentials, model=KNOWN_MODEL, dimensions=DIMENSIONS) as embedder,
        pytest.raises(TextRejected, match="direction"),
    ):
        embed_question(embedder, f"a shelf {word}")


def test_a_question_above_the_stated_limit_is_cut(provider: FlaskProvider) -> None:
    credentials = {"base_url": provider.base_url("vllm")}
    with open_embedder("openai", credentials=credentials, model=KNOWN_MODEL, dimensions=DIMENSIONS) as embedder:
        vector = embed_question(embedder, "long " * 200)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
