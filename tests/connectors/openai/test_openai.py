"""The client of the OpenAI protocol against a loopback server with every fault that a provider can have."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pytest

from embedd_dagster.connectors.http.retry_after import parse_duration, retry_after_seconds
from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
from embedd_dagster.connectors.openai.tokenizer import cut_at_tokens
from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.core.text_cutting import cut_at_bytes
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.errors import (
    EmbeddError,
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)
from tests.support.openai_server import FATAL, POISON, RunningServer, running_openai_server, vector_of

KEY = "sk-test-0123456789abcdef"
Open = Callable[..., OpenAIEmbedder]


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with running_openai_server() as server:
        yield server


@pytest.fixture
def server(running: RunningServer) -> RunningServer:
    running.reset()
    return running


@pytest.fixture
def open_openai(server: RunningServer) -> Iterator[Open]:
    opened = []

    def build(model: str = "text-embedding-3-small", dimensions: int = 1536, **more: Any) -> OpenAIEmbedder:
        fields = {"api_key": KEY, "base_url": server.base_url, **more}
        opened.append(OpenAIEmbedder(model=model, dimensions=dimensions, **fields))
        return opened[-1]

    yield build
    for embedder in opened:
        embedder.close()


def test_asks_for_base64_with_the_key_and_without_needless_fields(server: RunningServer, open_openai: Open) -> None:
    embedded = open_openai().embed_documents(["a", "b"])
    np.testing.assert_array_equal(embedded.vectors[1], vector_of("b", 1536))
    assert server.stats()["last_request"] == {
        "model": "text-embedding-3-small",
        "encoding_format": "base64",
        "authorization": f"Bearer {KEY}",
        "api-key": "",
    }
    assert embedded.tokens == server.stats()["tokens"]


def test_asks_for_dimensions_that_are_not_the_models_own(server: RunningServer, open_openai: Open) -> None:
    assert open_openai("openai/text-embedding-3-large", 256).embed_documents(["a"]).vectors.shape == (1, 256)
    assert server.stats()["last_request"]["dimensions"] == 256
    assert server.stats()["requests"] == 1


def test_an_unknown_model_is_asked_for_dimensions_only_if_its_own_differ(
    server: RunningServer, open_openai: Open
) -> None:
    server.behave(default_dimensions=768)
    embedder = open_openai("nomic-embed-text", 768)
    embedder.embed_documents(["a"])
    assert "dimensions" not in server.stats()["last_request"]

    embedder = open_openai("nomic-embed-text", 256)
    assert embedder.embed_documents(["a"]).vectors.shape == (1, 256)
    requests = server.stats()["requests"]
    embedder.embed_documents(["a"])
    assert server.stats()["requests"] == requests + 1, "what the server takes is remembered"


def test_the_fields_of_an_unknown_model_are_found_with_a_probe_text_instead_of_a_batch(
    server: RunningServer, open_openai: Open
) -> None:
    server.behave(default_dimensions=768, counts_texts=True)
    texts = [f"text {index}" for index in range(50)]
    open_openai("nomic-embed-text", 256).embed_documents(texts)
    counts = server.stats()["text_counts"]
    assert {counts[text] for text in texts} == {1}

    requests = server.stats()["requests"]
    open_openai("nomic-embed-text", 768).embed_query("a question")
    assert server.stats()["requests"] == requests + 1


@pytest.mark.parametrize("model", ["nomic-embed-text", "text-embedding-3-small"])
@pytest.mark.parametrize("answer", ["refuse", "ignore"])
def test_dimensions_that_the_server_cannot_give_are_rejected_with_both_numbers(
    server: RunningServer, open_openai: Open, model: str, answer: str
) -> None:
    server.behave(default_dimensions=768, dimensions_field=answer)
    with pytest.raises(EmbeddingRejected, match=r"768.*256"):
        open_openai(model, 256).embed_documents(["a"])


def test_a_known_model_on_a_server_that_refuses_dimensions_is_asked_without(
    server: RunningServer, open_openai: Open
) -> None:
    server.behave(default_dimensions=256, dimensions_field="refuse")
    embedder = open_openai("text-embedding-3-small", 256)
    assert embedder.embed_documents(["a"]).vectors.shape == (1, 256)
    embedder.embed_documents(["a"])
    assert server.stats()["requests"] == 3


@pytest.mark.parametrize("answer", ["refuse", "ignore"])
def test_a_server_that_answers_with_numbers_instead_of_base64_is_supported(
    server: RunningServer, open_openai: Open, answer: str
) -> None:
    server.behave(encoding_format_field=answer)
    vectors = open_openai().embed_documents(["a", "b"]).vectors
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[1], vector_of("b", 1536), rtol=1e-6)


@pytest.mark.parametrize("garble", ["shuffled", "no_index", "null_index"])
def test_answers_in_another_order_or_without_one_are_put_in_order(
    server: RunningServer, open_openai: Open, garble: str
) -> None:
    server.behave(garble=garble)
    vectors = open_openai().embed_documents(["a", "b", "c"]).vectors
    for text, vector in zip("abc", vectors, strict=True):
        np.testing.assert_array_equal(vector, vector_of(text, 1536))


@pytest.mark.parametrize("garble", ["truncated", "html", "too_few", "too_many", "one_null_index", "negative_index"])
def test_a_broken_answer_is_a_temporary_error(server: RunningServer, open_openai: Open, garble: str) -> None:
    server.behave(garble=garble, garble_next=1)
    embedder = open_openai()
    with pytest.raises(EmbeddingUnavailable):
        embedder.embed_documents(["a", "b", "c"])
    assert embedder.embed_documents(["a", "b", "c"]).vectors.shape == (3, 1536)


@pytest.mark.parametrize(("garble", "bad"), [("nan", 0), ("mixed_sizes", 2)])
def test_other_vectors_are_kept_if_one_cannot_be_read(
    server: RunningServer, open_openai: Open, garble: str, bad: int
) -> None:
    server.behave(garble=garble)
    vectors = open_openai().embed_documents(["a", "b", "c"]).vectors
    assert np.isnan(vectors[bad]).all()
    assert np.isfinite(np.delete(vectors, bad, axis=0)).all()


@pytest.mark.parametrize(
    "words", ["Dimensions: 30 x 40 cm", "encoding_format", "batch size", "The model x is not supported", "api key"]
)
@pytest.mark.parametrize(("model", "dimensions"), [("text-embedding-3-small", 16), ("bge-m3", 1536), ("bge-m3", 16)])
def test_a_refused_text_that_mentions_parameters_fails_one_row_only(
    open_openai: Open, model: str, dimensions: int, words: str
) -> None:
    texts = [f"text {number}" for number in range(40)]
    texts[17] = f"Oak shelf. {words} {POISON}"
    result = PacedEmbedder(open_openai(model, dimensions)).embed(texts)
    assert list(result.failed) == [17]
    assert np.isfinite(np.delete(result.vectors, 17, axis=0)).all()


@pytest.mark.parametrize(
    ("model", "native", "wanted"), [("text-embedding-ada-002", 384, 384), ("text-embedding-3-small", 768, 2048)]
)
def test_a_known_model_name_on_another_server_may_have_other_dimensions(
    server: RunningServer, open_openai: Open, model: str, native: int, wanted: int
) -> None:
    server.behave(default_dimensions=native, dimensions_field="refuse" if native == wanted else "take")
    assert open_openai(model, wanted).embed_documents(["a", "b"]).vectors.shape == (2, wanted)


@pytest.mark.parametrize(
    ("behaviour", "expected", "words"),
    [
        ({"api_key": "another"}, EmbeddingRejected, "api_key"),
        ({"models": ["another"]}, EmbeddingRejected, "text-embedding-3-small"),
        ({"refuse_next": 1, "is_quota_exhausted": True}, EmbeddingRejected, "insufficient_quota"),
        ({"refuse_next": 1}, EmbeddingRateLimited, "slow down"),
        ({"fail_next": 1}, EmbeddingUnavailable, "500"),
        ({"fail_next": 1, "fail_status": 503}, EmbeddingUnavailable, "503"),
        ({"fail_next": 1, "fail_status": 403}, EmbeddingRejected, "403"),
        ({"fail_next": 1, "fail_status": 402}, EmbeddingRejected, "402"),
        ({"fail_next": 1, "fail_status": 301}, EmbeddingRejected, "base_url"),
        ({"fail_next": 1, "fail_status": 413}, TextRejected, "413"),
        ({"max_tokens_per_text": 1}, TextRejected, "400"),
        ({"max_tokens": 1}, TextRejected, "max_tokens_per_request"),
        ({"max_items": 1}, TextRejected, "400"),
    ],
    ids=str,
)
def test_each_refusal_becomes_its_error_with_a_resolution(
    server: RunningServer, open_openai: Open, behaviour: dict[str, Any], expected: type[EmbeddError], words: str
) -> None:
    server.behave(**behaviour)
    with pytest.raises(expected) as raised:
        open_openai().embed_documents(["some text", "some other"])
    error = raised.value
    assert type(error) is expected
    assert words in f"{error.message} {error.resolution}"
    shown = repr((error.message, error.resolution, error.details, error.__cause__))
    assert "some" not in shown
    assert KEY[:8] not in shown
    assert str(pickle.loads(pickle.dumps(error))) == error.message


@pytest.mark.parametrize(("marker", "expected"), [(POISON, TextRejected), (FATAL, EmbeddingUnavailable)])
def test_a_faulty_text_is_not_quoted(open_openai: Open, marker: str, expected: type[EmbeddError]) -> None:
    with pytest.raises(expected) as raised:
        open_openai().embed_documents(["fine", f"patient {marker}"])
    assert "patient" not in repr((raised.value.message, raised.value.details))


@pytest.mark.parametrize(
    ("how", "asked", "expected"),
    [("seconds", 7, 7), ("seconds", 0, 0), ("date", 30, 30), ("ms", 0.25, 0.25), ("reset", 1.5, 1.5)],
)
def test_the_error_states_when_to_try_again(
    server: RunningServer, open_openai: Open, how: str, asked: float, expected: float
) -> None:
    server.behave(refuse_next=1, retry_after=how, retry_after_seconds=asked)
    with pytest.raises(EmbeddingRateLimited) as raised:
        open_openai().embed_documents(["a"])
    assert raised.value.retry_after_seconds == pytest.approx(expected, abs=2 if how == "date" else 1e-6)


def test_a_server_that_hangs_times_out(server: RunningServer, open_openai: Open) -> None:
    server.behave(hang_next=1, hang_seconds=5)
    with pytest.raises(EmbeddingUnavailable, match=r"0\.2 s"):
        open_openai(timeout_seconds=0.2).embed_documents(["a"])


def test_a_refused_connection_is_a_temporary_error(open_openai: Open) -> None:
    with pytest.raises(EmbeddingUnavailable, match=r"127\.0\.0\.1"):
        open_openai(base_url="http://127.0.0.1:1/v1").embed_documents(["a"])


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(
    monkeypatch: pytest.MonkeyPatch, open_openai: Open
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert open_openai().embed_documents(["a"]).vectors.shape == (1, 1536)


def test_the_query_of_a_base_url_stays_after_the_path(server: RunningServer, open_openai: Open) -> None:
    base_url = f"{server.url}/openai/deployments/mine/?api-version=2024-10-21"
    embedder = open_openai(base_url=base_url)
    assert embedder.embed_documents(["a"]).vectors.shape == (1, 1536)
    assert str(embedder.url) == f"{server.url}/openai/deployments/mine/embeddings?api-version=2024-10-21"


def test_azure_gets_the_key_in_its_own_header(open_openai: Open) -> None:
    embedder = open_openai(base_url="https://mine.openai.azure.com/openai/deployments/x?api-version=2024-10-21")
    assert embedder.http.headers["api-key"] == KEY
    assert "authorization" not in embedder.http.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "not an address"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "http://"},
        {"base_url": None, "api_key": None},
        {"api_key": "sk-with\nnewline"},
        {"api_key": "sk-ключ"},
    ],
    ids=str,
)
def test_credentials_that_cannot_be_right_are_rejected_at_once(open_openai: Open, fields: dict[str, Any]) -> None:
    with pytest.raises(EmbeddingRejected) as raised:
        open_openai(**fields)
    assert "sk-" not in raised.value.message


def test_another_server_needs_no_key(server: RunningServer) -> None:
    credentials = {"base_url": server.base_url}
    with open_embedder("openai", credentials=credentials, model="bge-m3", dimensions=1536) as embedder:
        embedder.embed_documents(["a"])
    assert server.stats()["last_request"]["authorization"] == ""


@pytest.mark.parametrize("text", ["a lone \ud800 surrogate", "NUL \x00 in it"])
def test_invalid_characters_of_a_question_are_removed(open_openai: Open, text: str) -> None:
    assert open_openai().embed_query(text).shape == (1536,)


def test_a_text_that_is_not_unicode_is_rejected(open_openai: Open) -> None:
    with pytest.raises(TextRejected):
        open_openai().embed_documents(["a lone \ud800 surrogate"])


def test_no_packed_request_is_above_the_providers_limits(server: RunningServer, open_openai: Open) -> None:
    from embedd_dagster.core.shards import pack_batches

    embedder = open_openai()
    texts = [("word " if index % 3 else "日本語 ") * (index * 7) + "." for index in range(500)]
    cuts = [embedder.cut(text) for text in texts]
    batches = list(pack_batches(((cut, cut.tokens, len(cut.text)) for cut in cuts), embedder.limits.batch))
    for batch in batches:
        assert sum(len(cut.text.encode()) // 4 + 1 for cut in batch) <= 300_000
        assert len(batch) <= 2048
    assert sum(map(len, batches)) == 500


def test_tokens_are_cut_exactly_where_the_limit_is() -> None:
    import bpe_openai

    count = bpe_openai.get_encoding("cl100k_base").encode_ordinary
    # a word of one token each, and words of three bytes a character
    assert len(count(cut_at_tokens("word " * 20_000, 8192, "cl100k_base").text)) == 8192
    japanese = "日本語のテキストを埋め込む。" * 2_000
    cut = cut_at_tokens(japanese, 8192, "cl100k_base")
    assert 8188 <= len(count(cut.text)) <= 8192
    assert japanese.startswith(cut.text)
    # more bytes than the limit has tokens, but fewer tokens: left alone, and counted
    kept = cut_at_tokens("word " * 8_000, 8192, "cl100k_base")
    assert not kept.truncated
    assert kept.tokens == 10_000, "the provider's own estimate, bytes / 4, is above the count"


@pytest.mark.parametrize("limit", range(4, 12))
def test_bytes_are_cut_between_characters(limit: int) -> None:
    cut = cut_at_bytes("aé日🎉" * 3, limit)
    assert cut.truncated
    assert len(cut.text.encode()) == cut.tokens <= limit
    assert limit - cut.tokens < 4


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1), ("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("20", 20), ("0", 0),
        ("", None), ("soon", None), ("-1", None), ("nan", None), ("1s later", None), ("inf", None),
        ("1" * 100_000 + "x", None),
    ],
)  # fmt: skip
def test_durations_are_parsed(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:10 GMT"}, 10),
        ({"retry-after": "Wed, 21 Oct 2015 07:00:00 GMT"}, 0),
        ({"retry-after": "whenever"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "5", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "5", "x-ratelimit-reset-tokens": "1s"}, 5),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, 1),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-remaining-requests": "9",
            },
            360,
        ),
    ],
)
def test_the_wait_is_read_from_the_headers(headers: dict[str, str], seconds: float | None) -> None:
    now = datetime(2015, 10, 21, 7, 28, tzinfo=UTC)
    assert retry_after_seconds(headers, now=now) == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        # bodies as the servers of the field write them
        (404, {"error": {"message": 'model "x" not found, try pulling it first', "type": "api_error"}}, EmbeddingRejected),
        (500, {"error": {"message": "json: unsupported value: NaN", "type": "api_error"}}, TextRejected),
        (413, {"error": "Input validation error: `inputs` must have less than 512 tokens", "error_type": "Validation"},
         TextRejected),
        (422, {"error": "Input validation error: batch size 64 > maximum allowed batch size 32"}, TextRejected),
        (424, {"error": "CUDA out of memory", "type": "Backend"}, EmbeddingUnavailable),
        (429, {"error": "Model is overloaded", "type": "Overloaded"}, EmbeddingRateLimited),
        (400, {"object": "error", "message": "maximum context length is 512", "type": "BadRequestError", "code": 400},
         TextRejected),
        (400, {"error": {"message": "", "param": "model"}}, EmbeddingRejected),
        (400, {"error": {"message": "", "code": "invalid_api_key"}}, EmbeddingRejected),
        (400, [], TextRejected),
        (400, {"error": None}, TextRejected),
        (405, None, EmbeddingRejected),
        (529, None, EmbeddingUnavailable),
    ],
)  # fmt: skip
def test_refusals_of_other_servers_become_the_right_error(
    status: int, body: object, expected: type[EmbeddError]
) -> None:
    import httpx

    from embedd_dagster.connectors.http.rejections import refusal

    content = b"<html>" if body is None else orjson.dumps(body)
    assert type(refusal(httpx.Response(status, content=content), provider="It", model="m")) is expected
