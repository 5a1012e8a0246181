"""What every embedder must do (`protocols/embedder.py`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from embedd_dagster.connectors.registry import open_embedder, registered
from embedd_dagster.errors import TextRejected
from embedd_dagster.protocols.embedder import Embedder
from tests.support.gemini_server import running_gemini_server
from tests.support.memory_embedder import POISON, MemoryEmbedder
from tests.support.openai_server import RunningServer, running_openai_server
from tests.support.toy_connector.spec import MODEL, SPEC
from tests.support.voyage_server import running_voyage_server

TEXTS = [
    "copy a whole directory tree",
    "a",
    "naïve café, 日本語のテキスト, Привет 🎉",
    "line one\nline two\ttabbed",
    "An entirely different matter: the price of butter in 1974, in cents.",
    "word " * 90,
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_openai_server() as running:
        yield running


@pytest.fixture(scope="module")
def gemini_server() -> Iterator[RunningServer]:
    with running_gemini_server(max_tokens_per_text=2048) as running:
        yield running


@pytest.fixture(scope="module")
def voyage_server() -> Iterator[RunningServer]:
    with running_voyage_server() as running:
        yield running


REFUSING = [
    "memory",
    "toy",
    "openai-small",
    "openai-512",
    "openai-unknown-model",
    "openai-float-lists",
    "gemini",
    "gemini-768",
    "voyage",
    "voyage-2048",
]
"""Those that may refuse a text; the local one takes every text."""


@pytest.fixture(params=[*REFUSING, "local"])
def embedder(
    request: pytest.FixtureRequest, server: RunningServer, gemini_server: RunningServer, voyage_server: RunningServer
) -> Iterator[Embedder]:
    gemini = {"api_key": "AIza-test", "base_url": f"{gemini_server.url}/v1beta"}
    voyage = {"api_key": "pa-test", "base_url": voyage_server.base_url}
    server.reset()
    # it only estimates tokens, where the real one counts: here the count is tested
    server.behave(max_tokens_per_text=1_000_000)
    credentials = {"api_key": "sk-test", "base_url": server.base_url}
    match request.param:
        case "memory":
            opened: Embedder = MemoryEmbedder(dimensions=16)
        case "toy":
            with registered(SPEC):
                opened = open_embedder("toy", credentials={}, model=MODEL, dimensions=16)
        case "openai-small":
            opened = open_embedder("openai", credentials=credentials, model="text-embedding-3-small", dimensions=1536)
        case "openai-512":
            opened = open_embedder("openai", credentials=credentials, model="text-embedding-3-large", dimensions=512)
        case "openai-unknown-model":
            server.behave(default_dimensions=768, dimensions_field="refuse")
            opened = open_embedder("openai", credentials=credentials, model="nomic-embed-text", dimensions=768)
        case "openai-float-lists":
            server.behave(encoding_format_field="ignore")
            opened = open_embedder("openai", credentials=credentials, model="text-embedding-3-small", dimensions=1536)
        case "gemini":
            opened = open_embedder("gemini", credentials=gemini, model="gemini-embedding-001", dimensions=3072)
        case "gemini-768":
            opened = open_embedder("gemini", credentials=gemini, model="gemini-embedding-001", dimensions=768)
        case "voyage":
            opened = open_embedder("voyage", credentials=voyage, model="voyage-3.5", dimensions=1024)
        case "voyage-2048":
            opened = open_embedder("voyage", credentials=voyage, model="voyage-3-large", dimensions=2048)
        case _:
            opened = open_embedder("local", credentials={}, model="all-MiniLM-L6-v2", dimensions=384)
    with opened:
        yield opened


def test_gives_one_finite_float32_vector_a_text(embedder: Embedder) -> None:
    embedded = embedder.embed_documents(TEXTS)
    assert embedded.vectors.dtype == np.float32
    assert embedded.vectors.shape[0] == len(TEXTS)
    assert np.isfinite(embedded.vectors).all()
    assert np.linalg.norm(embedded.vectors, axis=1) == pytest.approx(1, abs=0.05)
    assert embedded.vectors.flags.writeable
    assert embedded.tokens > 0


def test_vectors_stand_in_the_order_of_the_texts_and_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    together = embedder.embed_documents(TEXTS).vectors
    backwards = embedder.embed_documents(TEXTS[::-1]).vectors[::-1]
    alone = np.concatenate([embedder.embed_documents([text]).vectors for text in TEXTS])
    np.testing.assert_allclose(together, backwards, atol=1e-6)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert all(np.abs(left - right).max() > 1e-3 for left, right in pairwise(together))


def test_a_question_gets_the_vector_of_the_same_text_in_a_document(embedder: Embedder) -> None:
    vector = embedder.embed_query(TEXTS[0])
    assert vector.dtype == np.float32
    assert vector.ndim == 1
    np.testing.assert_allclose(vector, embedder.embed_documents(TEXTS[:1]).vectors[0], atol=1e-6)


def test_a_text_within_the_limit_is_left_as_it_is(embedder: Embedder) -> None:
    for text in TEXTS:
        cut = embedder.cut(text)
        assert (cut.text, cut.truncated) == (text, False)
        assert 0 < cut.tokens <= embedder.limits.batch.max_tokens


@pytest.mark.parametrize("unit", ["word ", "x", "日本語", "🎉", "\n", "a1-", " ", "naïve "], ids=repr)
def test_a_text_over_the_limit_is_cut_to_a_prefix_that_is_taken(embedder: Embedder, unit: str) -> None:
    text = unit * (1_500_000 // len(unit))
    cut = embedder.cut(text)
    assert cut.truncated
    assert 0 < len(cut.text) < len(text)
    assert text.startswith(cut.text)
    assert cut.text.encode()  # no half of a character
    assert embedder.cut(cut.text).text == cut.text
    if cut.text.strip():
        assert embedder.embed_documents([cut.text]).vectors.shape[0] == 1


def test_tokens_are_not_below_what_the_provider_counts(embedder: Embedder) -> None:
    for text in TEXTS:
        assert embedder.cut(text).tokens >= embedder.embed_documents([text]).tokens


def test_serves_several_threads(embedder: Embedder) -> None:
    expected = embedder.embed_documents(TEXTS).vectors
    answers = []

    def work() -> None:
        for _ in range(3):
            answers.append(embedder.embed_documents(TEXTS).vectors)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    for vectors in answers:
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


@pytest.mark.parametrize("embedder", REFUSING, indirect=True)
def test_a_rejected_text_is_a_text_error_that_does_not_quote_it(embedder: Embedder) -> None:
    with pytest.raises(TextRejected) as raised:
        embedder.embed_documents(["fine", f"secret {POISON}"])
    assert "secret" not in repr((raised.value.message, raised.value.resolution, raised.value.details))


def test_closing_twice_is_the_same_as_once(embedder: Embedder) -> None:
    embedder.close()
    embedder.close()
