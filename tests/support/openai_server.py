"""A loopback server that speaks OpenAI's embeddings protocol, with every fault that a provider can have.

Run it as a program (`python tests/support/openai_server.py --port 0 --latency-seconds 0.02`: it prints its base_url), or
start it from a test with `running_openai_server()`. Its behaviour can be changed while it runs (`POST /_behaviour`, the
fields of `Behaviour` as JSON), and it reports the requests it got (`GET /_stats`, `POST /_reset`), so tests with several
processes can use it.

The same text always gets the same vector, of about length 1; different texts get different ones. The vectors come from
a pool that is made once per number of dimensions, so the server costs hardly any CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from email.utils import formatdate
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import httpx
import numpy as np
import orjson
import uvicorn

POISON = "☠POISON☠"
FATAL = "☠FATAL☠"
_POOL_SIZE = 1024
_HOLD_POLL_SECONDS = 0.02
_HEAD_FLOATS = 3  # 12 bytes are 16 characters of base64 exactly


@dataclass(slots=True)
class Behaviour:
    """What the server does. `…_next` counts down with each request it applies to; `…_every` n means each n-th request."""

    latency_seconds: float = 0.0
    default_dimensions: int = 1536
    dimensions_field: str = "take"  # take | ignore | refuse
    encoding_format_field: str = "take"  # take | ignore | refuse
    api_key: str | None = None
    models: list[str] | None = None
    max_items: int = 2048
    max_tokens: int = 300_000
    max_tokens_per_text: int = 8192
    max_in_flight: int | None = None
    """More concurrent requests are refused with 429."""
    refuse_next: int = 0
    refuse_every: int = 0
    retry_after: str = "none"  # none | seconds | date | ms | reset
    retry_after_seconds: float = 0.0
    is_quota_exhausted: bool = False
    fail_next: int = 0
    fail_every: int = 0
    fail_status: int = 500
    hang_next: int = 0
    hang_seconds: float = 30.0
    held: bool = False
    """Requests wait until this is taken back, or the server is reset."""
    rejects_everything: bool = False
    garble: str = "none"  # none | truncated | html | too_few | too_many | nan | no_index | mixed_sizes | shuffled
    garble_next: int | None = None
    counts_texts: bool = False
    """Whether `stats.text_counts` says how often each text was embedded."""


@dataclass(slots=True)
class Stats:
    """What the server has seen. `texts` and `tokens` are those that were answered with a vector."""

    requests: int = 0
    texts: int = 0
    tokens: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    max_items: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    text_counts: Counter[str] = field(default_factory=Counter)
    last_request: dict[str, Any] = field(default_factory=dict)
    """The fields of the last request but its input, and those of its headers that hold a key."""


class _Pool:
    """Random vectors of one size, ready to be sent: only the first three numbers of each depend on the text alone."""

    def __init__(self, dimensions: int) -> None:
        vectors = np.random.default_rng(dimensions).standard_normal((_POOL_SIZE, dimensions), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors = vectors
        self.head = min(_HEAD_FLOATS, dimensions)
        self.tails = [base64.b64encode(vector[self.head :].tobytes()) for vector in vectors]

    def vector(self, text: bytes) -> np.ndarray:
        vector = self.vectors[crc32(text) % _POOL_SIZE].copy()
        vector[: self.head] = _head(text)[: self.head]
        return vector

    def base64(self, text: bytes) -> bytes:
        if self.head < _HEAD_FLOATS:
            return base64.b64encode(self.vector(text).tobytes())
        return base64.b64encode(_head(text).tobytes()) + self.tails[crc32(text) % _POOL_SIZE]


def _head(text: bytes) -> np.ndarray:
    """Three numbers from -0.1 to 0.1, a hash of the text."""
    hashed = np.frombuffer(blake2b(text, digest_size=6).digest(), dtype="<i2")
    return (hashed / np.float32(327_680)).astype("<f4")


@lru_cache(maxsize=8)
def _pool(dimensions: int) -> _Pool:
    return _Pool(dimensions)


def vector_of(text: str, dimensions: int) -> np.ndarray:
    """The vector that the server gives this text."""
    return _pool(dimensions).vector(text.encode())


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers: dict[str, str] = {}


class OpenAIServer:
    """The server as an ASGI application. Those of other protocols differ in how they read, check and write."""

    path_ending = "/embeddings"
    key_headers: tuple[str, ...] = ("authorization", "api-key")

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.stats = Stats()

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self._lifespan(receive, send)
            return
        body = await _read(receive)
        path: str = scope["path"]
        if path.endswith(self.path_ending):
            status, headers, content = await self._embeddings(dict(scope["headers"]), body)
        else:
            status, headers, content = self._control(path, body)
        head = [(name.encode(), value.encode()) for name, value in headers.items()]
        head.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": content})

    async def _lifespan(self, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    def _control(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {"content-type": "application/json"}
        if path == "/_behaviour":
            for name, value in orjson.loads(body or b"{}").items():
                if name not in {item.name for item in fields(Behaviour)}:
                    return 400, headers, orjson.dumps({"unknown": name})
                setattr(self.behaviour, name, value)
            return 200, headers, orjson.dumps(asdict(self.behaviour))
        if path == "/_reset":
            self.behaviour = Behaviour()
            self.stats = Stats(in_flight=self.stats.in_flight)
            return 200, headers, b"{}"
        if path == "/_stats":
            return 200, headers, orjson.dumps(self.stats, option=orjson.OPT_NON_STR_KEYS)
        return 404, headers, b'{"error": {"message": "Unknown request URL", "type": "invalid_request_error"}}'

    async def _embeddings(self, request_headers: dict[bytes, bytes], body: bytes) -> tuple[int, dict[str, str], bytes]:
        stats = self.stats
        stats.requests += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        headers = {"content-type": "application/json"}
        try:
            content = await self._answer(request_headers, body, headers)
            status = 200
        except Refused as refused:
            status, content = refused.status, orjson.dumps(self.error_body(refused))
            headers |= refused.headers
        finally:
            stats.in_flight -= 1
        stats.by_status[status] += 1
        return status, headers, content

    async def _answer(self, request_headers: dict[bytes, bytes], body: bytes, headers: dict[str, str]) -> bytes:
        behaviour, number = self.behaviour, self.stats.requests
        if behaviour.max_in_flight is not None and self.stats.in_flight > behaviour.max_in_flight:
            raise self._rate_limited()
        if self._counts_down("hang_next"):
            await asyncio.sleep(behaviour.hang_seconds)
        if behaviour.latency_seconds:
            await asyncio.sleep(behaviour.latency_seconds)
        while self.behaviour.held:
            await asyncio.sleep(_HOLD_POLL_SECONDS)
        self._check_account(request_headers)
        if self._counts_down("fail_next") or (behaviour.fail_every and number % behaviour.fail_every == 0):
            raise Refused(behaviour.fail_status, "The server had an error while processing your request.")
        if self._counts_down("refuse_next") or (behaviour.refuse_every and number % behaviour.refuse_every == 0):
            raise self._rate_limited()
        request = orjson.loads(body)
        texts = self.texts_of(request)
        self.stats.max_items = max(self.stats.max_items, len(texts))
        self.stats.last_request = self.fields_of(request) | {
            name: request_headers.get(name.encode(), b"").decode() for name in self.key_headers
        }
        tokens = self.check_request(request, texts)
        content = self.render(request, texts, tokens)
        garble = behaviour.garble
        if garble != "none" and (behaviour.garble_next is None or self._counts_down("garble_next")):
            return self._garbled(garble, content, headers)
        self.stats.texts += len(texts)
        self.stats.tokens += tokens
        if behaviour.counts_texts:
            self.stats.text_counts.update(texts)
        return content

    def error_body(self, refused: Refused) -> dict[str, Any]:
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}

    def texts_of(self, request: dict[str, Any]) -> list[str]:
        return request["input"] if isinstance(request["input"], list) else [request["input"]]

    def fields_of(self, request: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in request.items() if name != "input"}

    def _counts_down(self, name: str) -> bool:
        left = getattr(self.behaviour, name)
        if not left:
            return False
        setattr(self.behaviour, name, left - 1)
        return True

    def _check_account(self, request_headers: dict[bytes, bytes]) -> None:
        key = self.behaviour.api_key
        if key is None:
            return
        sent = "".join(request_headers.get(name.encode(), b"").decode() for name in self.key_headers)
        sent = sent.removeprefix("Bearer ")
        if sent != key:
            raise self.wrong_key(sent)

    def wrong_key(self, sent: str) -> Refused:
        # as OpenAI does, it repeats a part of the key
        return Refused(401, f"Incorrect API key provided: {sent[:8]}****.", code="invalid_api_key")

    def _rate_limited(self) -> Refused:
        behaviour = self.behaviour
        if behaviour.is_quota_exhausted:
            return Refused(429, "You exceeded your current quota.", code="insufficient_quota")
        refused = Refused(429, "Rate limit reached for requests.", code="rate_limit_exceeded")
        seconds = behaviour.retry_after_seconds
        if behaviour.retry_after == "seconds":
            refused.headers = {"retry-after": f"{seconds:g}"}
        elif behaviour.retry_after == "date":
            refused.headers = {"retry-after": formatdate(time.time() + seconds, usegmt=True)}
        elif behaviour.retry_after == "ms":
            refused.headers = {"retry-after-ms": f"{seconds * 1000:g}", "retry-after": "60"}
        elif behaviour.retry_after == "reset":
            refused.headers = {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": f"{seconds * 1000:g}ms",
                "x-ratelimit-remaining-tokens": "9000",
                "x-ratelimit-reset-tokens": "6m0s",
            }
        return refused

    def check_request(self, request: dict[str, Any], texts: list[str]) -> int:
        """The tokens of the request, four bytes each. Raises for what OpenAI answers 400 or 404 to."""
        behaviour = self.behaviour
        if behaviour.models is not None and request["model"] not in behaviour.models:
            raise Refused(404, f"The model `{request['model']}` does not exist.", code="model_not_found")
        if "dimensions" in request and behaviour.dimensions_field == "refuse":
            raise Refused(400, "This model does not support specifying dimensions.", param="dimensions")
        if "encoding_format" in request and behaviour.encoding_format_field == "refuse":
            raise Refused(400, "Unknown field encoding_format.", param="encoding_format")
        return self.check_texts(texts)

    def check_texts(self, texts: list[str]) -> int:
        """The tokens of the texts. Raises for what any of these protocols refuses, in OpenAI's words."""
        behaviour = self.behaviour
        if len(texts) > behaviour.max_items:
            raise Refused(400, f"batch size {len(texts)} > maximum allowed batch size {behaviour.max_items}")
        sizes = [len(text.encode()) // 4 + 1 for text in texts]
        if max(sizes, default=0) > behaviour.max_tokens_per_text:
            raise Refused(400, f"This model's maximum context length is {behaviour.max_tokens_per_text} tokens.")
        if sum(sizes) > behaviour.max_tokens:
            raise Refused(400, f"Requested {sum(sizes)} tokens.", code="max_tokens_per_request")
        for text in texts:
            if POISON in text or behaviour.rejects_everything or not text:
                # as some servers do, it repeats the text
                raise Refused(400, f"'$.input' is invalid: {text}", param="input")
            if FATAL in text:
                raise Refused(500, "The server had an error while processing your request.")
        return sum(sizes)

    def render(self, request: dict[str, Any], texts: list[str], tokens: int, *, asked: str = "dimensions") -> bytes:
        """The answer, with as many dimensions as the field `asked` says."""
        behaviour = self.behaviour
        dimensions = behaviour.default_dimensions
        if behaviour.dimensions_field == "take":
            dimensions = request.get(asked, dimensions)
        is_base64 = request.get("encoding_format") == "base64" and behaviour.encoding_format_field == "take"
        pool = _pool(dimensions)
        parts = []
        for index, text in enumerate(texts):
            raw = text.encode()
            if is_base64:
                vector = b'"' + pool.base64(raw) + b'"'
            else:
                vector = orjson.dumps(pool.vector(raw), option=orjson.OPT_SERIALIZE_NUMPY)
            parts.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector))
        usage = b'"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
        data = b",".join(parts)
        return b'{"object":"list","data":[%b],"model":%b,%b}' % (data, orjson.dumps(request["model"]), usage)

    def _garbled(self, how: str, content: bytes, headers: dict[str, str]) -> bytes:
        if how == "truncated":
            return content[: len(content) // 2]
        if how == "html":
            headers["content-type"] = "text/html"
            return b"<html><body>It works!</body></html>"
        document = orjson.loads(content)
        data = document["data"]
        if how == "too_few":
            data.pop()
        elif how == "too_many":
            data.append(data[0])
        elif how == "nan":
            vector = np.full(self.behaviour.default_dimensions, np.nan, dtype="<f4")
            data[0]["embedding"] = base64.b64encode(vector.tobytes()).decode()
        elif how.endswith("_index"):
            _garble_index(how, data)
        elif how == "mixed_sizes":
            data[-1]["embedding"] = data[-1]["embedding"][:16]
        elif how == "shuffled":
            data.reverse()
        return orjson.dumps(document)


def _garble_index(how: str, data: list[dict[str, Any]]) -> None:
    if how == "no_index":
        for item in data:
            del item["index"]
    elif how == "null_index":
        for item in data:
            item["index"] = None
    elif how == "one_null_index":
        data[0]["index"] = None
    elif how == "negative_index":
        data[-1]["index"] = -1


async def _read(receive: Callable[[], Awaitable[Any]]) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server in a process of its own, as tests see it."""

    url: str
    process: subprocess.Popen[str]

    @property
    def base_url(self) -> str:
        """What an embedding provider is configured with."""
        return f"{self.url}/v1"

    def behave(self, **changes: Any) -> None:
        """Changes fields of `Behaviour`; what is not named stays."""
        httpx.post(f"{self.url}/_behaviour", json=changes, trust_env=False).raise_for_status()

    def reset(self) -> None:
        """The default behaviour, and nothing seen."""
        httpx.post(f"{self.url}/_reset", trust_env=False).raise_for_status()

    def stats(self) -> dict[str, Any]:
        """The fields of `Stats`; the keys of `by_status` are strings, as JSON wants them."""
        answer: dict[str, Any] = httpx.get(f"{self.url}/_stats", trust_env=False).raise_for_status().json()
        return answer


def running_openai_server(**behaviour: Any) -> contextlib.AbstractContextManager[RunningServer]:
    """A server on a free port in a process of its own, stopped at the end."""
    return running_server("openai_server", **behaviour)


@contextlib.contextmanager
def running_server(module: str, **behaviour: Any) -> Iterator[RunningServer]:
    """As `running_openai_server`, the server of another module in this folder."""
    program = [sys.executable, "-m", f"tests.support.{module}"]
    command = [*program, "--port", "0", "--behaviour", orjson.dumps(behaviour).decode()]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip().removesuffix("/v1")
            assert url, "the server ended before it was ready"
            yield RunningServer(url, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def main(application: type[OpenAIServer] = OpenAIServer) -> None:
    """Serves until it is terminated, or until the process that started it is gone."""
    parser = argparse.ArgumentParser(description="A loopback server that speaks a provider's embeddings protocol")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--latency-seconds", type=float)
    parser.add_argument("--dimensions", type=int, help="of answers to requests that do not ask for any")
    parser.add_argument("--behaviour", default="{}", help="fields of Behaviour as JSON")
    options = parser.parse_args()
    behaviour = Behaviour(**orjson.loads(options.behaviour))
    if options.latency_seconds is not None:
        behaviour.latency_seconds = options.latency_seconds
    if options.dimensions is not None:
        behaviour.default_dimensions = options.dimensions
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # inherited by its connections; without it, a short answer waits 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", options.port))
    listener.listen(256)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    config = uvicorn.Config(application(behaviour), log_level="error", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    asyncio.run(_serve(server, listener, os.getppid()))


async def _serve(server: uvicorn.Server, listener: socket.socket, parent: int) -> None:
    async def watch_parent() -> None:
        # a test process that is killed cannot stop it
        while not server.should_exit:
            await asyncio.sleep(1)
            server.should_exit |= os.getppid() != parent

    watch = asyncio.create_task(watch_parent())
    await server.serve(sockets=[listener])
    watch.cancel()


if __name__ == "__main__":
    main()
