"""An embedding provider whose refusals repeat the refused text and the key in full.

It speaks enough of OpenAI's protocol to build a vector table of any dimensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSED = "REFUSE-ME"


class EchoingProvider:
    """Knows one key, and refuses texts that contain REFUSED."""

    def __init__(self, api_key: str) -> None:
        provider = self
        self.api_key = api_key
        self.seen = 0
        """Received texts, embedded or not."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = provider.answer(self.headers.get("Authorization", ""), body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def answer(self, authorization: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        self.seen += len(texts)
        said = f"key {authorization!r}, your input was {texts!r}"
        if authorization != f"Bearer {self.api_key}":
            return 401, _error(f"Incorrect API key provided: {said}", "invalid_api_key")
        if any(REFUSED in text for text in texts):
            return 400, _error(f"This text is refused: {said}", "invalid_input", param="input")
        dimensions = body.get("dimensions", 16)
        data = [{"index": n, "embedding": _vector(text, dimensions)} for n, text in enumerate(texts)]
        return 200, {"data": data, "model": body["model"], "usage": {"prompt_tokens": 5 * len(texts)}}

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _error(message: str, code: str, *, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def _vector(text: str, dimensions: int) -> list[float]:
    digest = hashlib.shake_256(text.encode()).digest(dimensions)
    return [(byte - 127.5) / 128 for byte in digest]


@contextlib.contextmanager
def running_echoing_provider(api_key: str) -> Iterator[EchoingProvider]:
    """The provider, served on loopback for as long as the block lasts."""
    provider = EchoingProvider(api_key)
    thread = threading.Thread(target=provider.run, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        provider.close()
        thread.join(5)
