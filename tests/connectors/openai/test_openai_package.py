"""The `openai` package carries the requests and adds nothing of its own to them."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
from embedd_dagster.errors import EmbeddError
from tests.support.raw_server import fixed, read_request, serving

_ANSWER = fixed(b'{"data": [{"index": 0, "embedding": [1.0, 0.0]}], "usage": {"prompt_tokens": 1}}')
_ENVIRONMENT = {
    "OPENAI_API_KEY": "sk-of-the-process",
    "OPENAI_ADMIN_KEY": "sk-of-the-process",
    "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
    "OPENAI_ORG_ID": "org-of-the-process",
    "OPENAI_PROJECT_ID": "project-of-the-process",
    "OPENAI_CUSTOM_HEADERS": "X-Custom: of-the-process\nAuthorization: Bearer of-the-process",
}


class Recorder:
    """Answers every request of one connection, and keeps the heads of the requests."""

    def __init__(self, answer: bytes = _ANSWER) -> None:
        self.answer = answer
        self.heads: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        while head := read_request(connection):
            self.heads.append(head)
            connection.sendall(self.answer)

    def header_names(self) -> set[bytes]:
        return {line.partition(b":")[0].lower() for line in self.heads[0].split(b"\r\n")[1:]}


def _ask(url: str, api_key: str | None = None) -> None:
    with OpenAIEmbedder(model="m", dimensions=2, api_key=api_key, base_url=f"{url}v1", timeout_seconds=20) as embedder:
        embedder.embed_documents(["a"])


@pytest.mark.parametrize("api_key", [None, "sk-own"])
def test_a_request_has_our_headers_only(api_key: str | None) -> None:
    recorder = Recorder()
    with serving(recorder) as url:
        _ask(url, api_key)
    ours = {b"host", b"accept", b"accept-encoding", b"connection", b"user-agent", b"content-type", b"content-length"}
    assert recorder.header_names() == ours | ({b"authorization"} if api_key else set())
    assert b"user-agent: embedd\r\n" in recorder.heads[0].lower()


@pytest.mark.parametrize("api_key", [None, "sk-own"])
def test_openai_settings_in_the_environment_do_not_count(monkeypatch: pytest.MonkeyPatch, api_key: str | None) -> None:
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    recorder = Recorder()
    with serving(recorder) as url:
        _ask(url, api_key)
    assert b"of-the-process" not in recorder.heads[0]
    assert (b"Bearer sk-own" in recorder.heads[0]) is (api_key is not None)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_request_is_not_retried_even_if_the_server_asks_for_it(status: int) -> None:
    body = b'{"error": {"message": "later"}}'
    head = b"HTTP/1.1 %d X\r\nRetry-After: 0\r\nx-should-retry: true\r\nContent-Length: %d\r\n\r\n" % (
        status,
        len(body),
    )
    recorder = Recorder(head + body)
    with serving(recorder) as url, pytest.raises(EmbeddError):
        _ask(url)
    assert len(recorder.heads) == 1


def test_a_redirect_is_not_followed() -> None:
    recorder = Recorder(b"HTTP/1.1 307 X\r\nLocation: /v1/embeddings\r\nContent-Length: 0\r\n\r\n")
    with serving(recorder) as url, pytest.raises(EmbeddError, match="HTTP 307"):
        _ask(url)
    assert len(recorder.heads) == 1


def test_the_package_is_imported_only_when_an_embedder_is_opened() -> None:
    code = "import sys, embedd_dagster.connectors.openai.embedder; print('openai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
