"""The client of Gemini's API against a loopback server that speaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.errors import (
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)
from embedd_dagster.protocols.embedder import Embedder
from tests.support.gemini_server import running_gemini_server
from tests.support.openai_server import POISON, RunningServer, vector_of

KEY = "AIzaSy-0123456789abcdef"
Open = Callable[..., Embedder]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with running_gemini_server() as server:
        yield server


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    running.reset()
    return running


@pytest.fixture
def open_gemini(server: RunningServer) -> Iterator[Open]:
    opened = []

    def build(dimensions: int = 3072, model: str = "gemini-embedding-001", api_key: str = KEY) -> Embedder:
        credentials = {"api_key": api_key, "base_url": f"{server.url}/v1beta"}
        opened.append(open_embedder("gemini", credentials=credentials, model=model, dimensions=dimensions))
        return opened[-1]

    yield build
    for embedder in opened:
        embedder.close()


def test_rows_are_asked_for_as_documents_and_questions_as_queries(server: RunningServer, open_gemini: Open) -> None:
    embedder = open_gemini()
    vectors = embedder.embed_documents(["a", "b"]).vectors
    np.testing.assert_allclose(vectors[1], vector_of("b", 3072) / np.linalg.norm(vector_of("b", 3072)), atol=1e-6)
    asked = {"model": "models/gemini-embedding-001", "x-goog-api-key": KEY}
    assert server.stats()["last_request"] == asked | {"taskType": "RETRIEVAL_DOCUMENT"}
    embedder.embed_query("a")
    assert server.stats()["last_request"] == asked | {"taskType": "RETRIEVAL_QUERY"}


def test_shortened_vectors_are_scaled_to_length_one(server: RunningServer, open_gemini: Open) -> None:
    vectors = open_gemini(768).embed_documents(["a", "b", "c"]).vectors
    assert server.stats()["last_request"]["outputDimensionality"] == 768
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_wrong_key_is_rejected_although_the_status_is_400(server: RunningServer, open_gemini: Open) -> None:
    server.behave(api_key="another")
    with pytest.raises(EmbeddingRejected, match=r"api_key.*API_KEY_INVALID") as raised:
        open_gemini().embed_documents(["a"])
    assert KEY[:8] not in repr(raised.value.__dict__)


def test_a_missing_key_is_rejected_before_any_request() -> None:
    with pytest.raises(EmbeddingRejected, match="no api_key"):
        open_embedder("gemini", credentials={}, model="gemini-embedding-001", dimensions=3072)


def test_the_wait_is_read_from_the_body_of_a_refusal(server: RunningServer, open_gemini: Open) -> None:
    server.behave(refuse_next=1, retry_after_seconds=13.5)
    with pytest.raises(EmbeddingRateLimited, match="RESOURCE_EXHAUSTED") as raised:
        open_gemini().embed_documents(["a"])
    assert raised.value.retry_after_seconds == 13.5


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_error_is_temporary(server: RunningServer, open_gemini: Open, status: int) -> None:
    server.behave(fail_next=1, fail_status=status)
    with pytest.raises(EmbeddingUnavailable, match=str(status)):
        open_gemini().embed_documents(["a"])


def test_an_unknown_model_and_wrong_dimensions_are_rejected(open_gemini: Open) -> None:
    with pytest.raises(EmbeddingRejected, match=r"does not have model 'gemini-0'.*NOT_FOUND"):
        open_gemini(model="gemini-0").embed_documents(["a"])
    with pytest.raises(EmbeddingRejected, match="64 dimensions"):
        open_gemini(64).embed_documents(["a"])


def test_a_batch_above_the_limit_is_reported_as_too_large(open_gemini: Open) -> None:
    embedder = open_gemini()
    assert embedder.limits.batch.max_items == 100
    with pytest.raises(TextRejected) as raised:
        embedder.embed_documents(["a"] * 101)
    assert raised.value.details["too_large"]


def test_one_failing_text_is_found_among_many(open_gemini: Open) -> None:
    texts: list[str] = [f"text {number}" for number in range(90)]
    # words that a refusal may have are in it, and the server repeats them
    texts[41] = f"secret dimensions: 30 x 40, output_dimension, encoding_format, batch size {POISON}"
    result = PacedEmbedder(open_gemini(256)).embed(texts)
    assert list(result.failed) == [41]
    assert "secret" not in str(result.failed[41])
    assert np.isfinite(np.delete(result.vectors, 41, axis=0)).all()


@pytest.mark.parametrize("answer", [{"garble": "html"}, {"garble": "truncated"}])
def test_an_answer_outside_the_protocol_is_a_temporary_error(
    server: RunningServer, open_gemini: Open, answer: dict[str, Any]
) -> None:
    server.behave(**answer)
    with pytest.raises(EmbeddingUnavailable, match="does not follow the embeddings protocol"):
        open_gemini().embed_documents(["a"])
