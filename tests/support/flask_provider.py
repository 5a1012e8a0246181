"""An embeddings server as users write one: Flask behind gunicorn. A word in a text decides the fault of its answer.

`FLASK_PROVIDER` in front of the path chooses a server: `/plain/v1/embeddings` and so on (see `_SERVERS`). It runs in one process
and records requests: `GET /seen` gives the texts of each request, in order, and `DELETE /seen` forgets them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import flask
import httpx

DIMENSIONS = 16
Answer = tuple[Any, int]

app = flask.Flask(__name__)
app.logger.disabled = True  # its errors are on purpose
_seen: list[list[str]] = []
_one_at_a_time = threading.Lock()


def vector_of(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """Not of length 1, as many models give them."""
    digest = blake2b(text.encode(), digest_size=64).digest()
    return [digest[index % 64] - 127.5 + index / 1000 for index in range(dimensions)]


def _items(texts: list[str], dimensions: int = DIMENSIONS) -> list[dict[str, Any]]:
    items = []
    for index, text in enumerate(texts):
        vector = vector_of(text, dimensions)
        if "NAN" in text:
            vector[3] = float("nan")
        if "INFINITY" in text:
            vector[3] = float("inf")
        if "ZEROS" in text:
            vector = [0.0] * dimensions
        if "TINY" in text:
            vector = [1e-44] * dimensions
        if "HUGE" in text:
            vector = [number * 1e20 for number in vector]
        if "SHORT" in text:
            vector = vector[:-1]
        items.append({"object": "embedding", "index": index, "embedding": vector})
    return items


def _answer(items: list[dict[str, Any]]) -> Answer:
    return {"object": "list", "data": items, "model": "m"}, 200


def _plain(texts: list[str]) -> Answer:
    joined = "\n".join(texts)
    if "ERROR500" in joined:
        raise RuntimeError("as a bug of the model's code")
    if "FORBIDDEN" in joined:
        return "<html><h1>403 Forbidden</h1>Blocked by the firewall.</html>", 403
    if "HANG" in joined:
        time.sleep(1.5)
    if "GARBAGE" in joined:
        return '{"data": [{"embedding": [0.1, 0.2', 200
    items = _items(texts)
    if "DROPPED" in joined:
        items = [item for item, text in zip(items, texts, strict=True) if "DROPPED" not in text]
    return _answer(items)


def _wide(texts: list[str]) -> Answer:
    return _answer(_items(texts, 3072))


def _zeros(texts: list[str]) -> Answer:
    return _answer([item | {"embedding": [0.0] * DIMENSIONS} for item in _items(texts)])


def _nonsense(_texts: list[str]) -> Answer:
    return "<html>Welcome to nginx!</html>", 200


def _forbidden(_texts: list[str]) -> Answer:
    return {"error": {"message": "Forbidden"}}, 403


def _slow(texts: list[str]) -> Answer:
    """One request after the other, 8 ms a text."""
    with _one_at_a_time:
        time.sleep(0.008 * len(texts))
        return _answer(_items(texts))


def _words_of(text: str) -> int:
    return len(text.split()) + 2


def _vllm(texts: list[str]) -> Answer:
    longest = max(map(_words_of, texts))
    if longest > 64:
        message = (
            f"This model's maximum context length is 64 tokens. However, you requested {longest} tokens in the input."
        )
        return {"object": "error", "message": message, "type": "BadRequestError", "code": 400}, 400
    return _answer(_items(texts))


def _tei(texts: list[str]) -> Answer:
    longest = max(map(_words_of, texts))
    if longest >= 64:
        message = f"Input validation error: `inputs` must have less than 64 tokens. Given: {longest}"
        return {"error": message, "error_type": "Validation"}, 413
    return _answer(_items(texts))


def _ollama(texts: list[str]) -> Answer:
    if max(map(_words_of, texts)) > 64:
        return {"error": {"message": "the input length exceeds the context length", "type": "api_error"}}, 400
    return _answer(_items(texts))


def _small_account(texts: list[str]) -> Answer:
    tokens = sum(len(text) // 4 for text in texts)
    if tokens > 2000:
        message = (
            f"Request too large for m in organization org-1 on tokens per min (TPM): Limit 2000, Requested {tokens}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
        return {"error": {"message": message, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}}, 429
    return {**_answer(_items(texts))[0], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}, 200


_SERVERS: dict[str, Callable[[list[str]], Answer]] = {
    "plain": _plain,
    "wide": _wide,
    "zeros": _zeros,
    "nonsense": _nonsense,
    "forbidden": _forbidden,
    "slow": _slow,
    "vllm": _vllm,
    "tei": _tei,
    "ollama": _ollama,
    "small-account": _small_account,
}


@app.post("/<server>/v1/embeddings")
def _embeddings(server: str) -> Answer:
    texts = flask.request.get_json()["input"]
    _seen.append(texts)
    return _SERVERS[server](texts)


@app.get("/seen")
def _get_seen() -> Answer:
    return list(_seen), 200


@app.delete("/seen")
def _forget_seen() -> Answer:
    _seen.clear()
    return {}, 200


@dataclass(frozen=True, slots=True)
class FlaskProvider:
    """The running server, as tests see it."""

    url: str

    def base_url(self, server: str = "plain") -> str:
        """What an embedding provider is configured with."""
        return f"{self.url}/{server}/v1"

    def seen(self) -> list[list[str]]:
        """The texts of each request, in the order in which they came."""
        requests: list[list[str]] = httpx.get(f"{self.url}/seen", trust_env=False).raise_for_status().json()
        return requests

    def forget(self) -> None:
        """Forgets the requests seen so far."""
        httpx.delete(f"{self.url}/seen", trust_env=False).raise_for_status()


@contextlib.contextmanager
def running_flask_provider() -> Iterator[FlaskProvider]:
    """The server in a gunicorn of its own, stopped at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    gunicorn = [sys.executable, "-m", "gunicorn", "--workers", "1", "--worker-class", "gthread", "--threads", "24"]
    command = [*gunicorn, "--bind", f"127.0.0.1:{port}", "--log-level", "critical", "tests.support.flask_provider:app"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ, start_new_session=True) as process:
        try:
            provider = FlaskProvider(f"http://127.0.0.1:{port}")
            _wait_until_up(provider)
            yield provider
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(provider: FlaskProvider) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            provider.forget()
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
