"""The client of Voyage's API against a loopback server that speaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.connectors.voyage.models import MODELS
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.errors import (
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)
from embedd_dagster.protocols.embedder import Embedder
from tests.support.openai_server import POISON, RunningServer, vector_of
from tests.support.voyage_server import running_voyage_server

KEY = "pa-0123456789abcdef"
Open = Callable[..., Embedder]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with running_voyage_server() as server:
        yield server


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    running.reset()
    return running


@pytest.fixture
def open_voyage(server: RunningServer) -> Iterator[Open]:
    opened = []

    def build(model: str = "voyage-3.5", dimensions: int = 1024) -> Embedder:
        credentials = {"api_key": KEY, "base_url": server.base_url}
        opened.append(open_embedder("voyage", credentials=credentials, model=model, dimensions=dimensions))
        return opened[-1]

    yield build
    for embedder in opened:
        embedder.close()


def test_rows_are_asked_for_as_documents_and_questions_as_queries(server: RunningServer, open_voyage: Open) -> None:
    embedder = open_voyage()
    embedded = embedder.embed_documents(["a", "b"])
    np.testing.assert_array_equal(embedded.vectors[1], vector_of("b", 1024))
    asked = {
        "model": "voyage-3.5",
        "encoding_format": "base64",
        "truncation": False,
        "authorization": f"Bearer {KEY}",
    }
    assert server.stats()["last_request"] == asked | {"input_type": "document"}
    assert embedded.tokens == server.stats()["tokens"]
    embedder.embed_query("a")
    assert server.stats()["last_request"] == asked | {"input_type": "query"}


def test_asks_for_dimensions_that_are_not_the_models_own(server: RunningServer, open_voyage: Open) -> None:
    assert open_voyage(dimensions=256).embed_documents(["a"]).vectors.shape == (1, 256)
    assert server.stats()["last_request"]["output_dimension"] == 256


def test_a_wrong_key_is_rejected(server: RunningServer, open_voyage: Open) -> None:
    server.behave(api_key="another")
    with pytest.raises(EmbeddingRejected, match="refuses the api_key") as raised:
        open_voyage().embed_documents(["a"])
    assert KEY[:8] not in repr(raised.value.__dict__)


def test_a_missing_key_is_rejected_before_any_request() -> None:
    with pytest.raises(EmbeddingRejected, match="no api_key"):
        open_embedder("voyage", credentials={}, model="voyage-3.5", dimensions=1024)


def test_an_unknown_model_and_wrong_dimensions_are_rejected(open_voyage: Open) -> None:
    with pytest.raises(EmbeddingRejected, match="does not have model 'voyage-0'"):
        open_voyage("voyage-0").embed_documents(["a"])
    with pytest.raises(EmbeddingRejected, match="300 dimensions"):
        open_voyage(dimensions=300).embed_documents(["a"])


def test_rate_limits_and_server_errors_are_temporary(server: RunningServer, open_voyage: Open) -> None:
    server.behave(refuse_next=1, retry_after="seconds", retry_after_seconds=7)
    with pytest.raises(EmbeddingRateLimited) as raised:
        open_voyage().embed_documents(["a"])
    assert raised.value.retry_after_seconds == 7
    server.behave(fail_next=1, fail_status=503)
    with pytest.raises(EmbeddingUnavailable, match="503"):
        open_voyage().embed_documents(["a"])


@pytest.mark.parametrize(
    ("model", "tokens"), [("voyage-3-large", 120_000), ("voyage-3.5", 320_000), ("voyage-3.5-lite", 1_000_000)]
)
def test_the_largest_request_is_accepted_and_a_larger_one_is_reported_as_too_large(
    open_voyage: Open, model: str, tokens: int
) -> None:
    embedder = open_voyage(model)
    limits = embedder.limits
    text = embedder.cut("x" * 100_000).text
    assert len(text) == limits.max_tokens_per_text
    fullest = [text] * (limits.batch.max_tokens // len(text))
    assert embedder.embed_documents(fullest).vectors.shape == (len(fullest), 1024)
    with pytest.raises(TextRejected) as raised:
        embedder.embed_documents([text] * (tokens // len(text) + 1))
    assert raised.value.details["too_large"]


def test_one_failing_text_is_found_among_many(open_voyage: Open) -> None:
    texts = [f"text {number}" for number in range(200)]
    # words that a refusal may have are in it, and the server repeats them
    texts[41] = f"secret dimensions: 30 x 40, output_dimension, encoding_format, batch size {POISON}"
    result = PacedEmbedder(open_voyage()).embed(texts)
    assert list(result.failed) == [41]
    assert "secret" not in str(result.failed[41])


def test_every_model_of_the_catalog_opens_at_all_its_dimensions() -> None:
    for model in MODELS:
        for dimensions in (model.dimensions, *model.other_dimensions):
            open_embedder("voyage", credentials={"api_key": KEY}, model=model.name, dimensions=dimensions).close()
