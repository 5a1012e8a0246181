"""The client against servers of other projects, which end their connections in different ways."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
from tests.support.foreign_servers import running_foreign_server, vector_of

_LONG_LIVED = ("gunicorn_sync", "gunicorn_gthread", "flask", "http_server")


@pytest.fixture(scope="module", params=_LONG_LIVED)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_foreign_server(request.param) as running:
        yield running


def _open(url: str, dimensions: int, path: str = "/v1") -> OpenAIEmbedder:
    return OpenAIEmbedder(
        model="text-embedding-3-large", dimensions=dimensions, api_key=None, base_url=url + path, concurrency=4
    )


def _check_answer(embedder: OpenAIEmbedder, first: int, count: int, dimensions: int) -> None:
    texts = [f"text {number}" for number in range(first, first + count)]
    vectors = embedder.embed_documents(texts).vectors
    np.testing.assert_array_equal(vectors, [vector_of(text, dimensions) for text in texts])


@pytest.mark.parametrize("path", ["/v1", "/with-length/v1"])
@pytest.mark.parametrize(("count", "dimensions"), [(1, 8), (256, 150), (256, 1100)])
def test_answers_of_all_sizes_and_endings_are_read_completely(url: str, path: str, count: int, dimensions: int) -> None:
    """Answers of 100 bytes, 200 KB and 1.5 MB, with Content-Length, chunked, or up to the end of the connection."""
    with _open(url, dimensions, path) as embedder:
        for first in range(0, 5 * count, count):
            _check_answer(embedder, first, count, dimensions)


def test_an_answer_of_six_megabytes_is_read_completely(url: str) -> None:
    with _open(url, 2250) as embedder:
        _check_answer(embedder, 0, 512, 2250)


def test_no_answer_is_lost_when_the_server_closes_connections_all_the_time(url: str) -> None:
    """Workers and connections end all the time, and four threads go on asking."""
    with _open(url, 64) as embedder, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda first: _check_answer(embedder, first, 16, 64), range(0, 640, 16)))


def test_the_last_answer_of_a_server_that_shuts_down_is_read_completely() -> None:
    with running_foreign_server("uvicorn_of_three_requests") as url, _open(url, 1500) as embedder:
        for first in (0, 256, 512):
            _check_answer(embedder, first, 256, 1500)


@pytest.mark.parametrize("model", ["text-embedding-3-small", "bge-m3"])
def test_fields_that_fastapi_refuses_in_a_list_are_left_out(model: str) -> None:
    with (
        running_foreign_server("fastapi") as url,
        OpenAIEmbedder(model=model, dimensions=1536, api_key=None, base_url=f"{url}/v1") as embedder,
    ):
        for first in (0, 5):
            _check_answer(embedder, first, 5, 1536)
