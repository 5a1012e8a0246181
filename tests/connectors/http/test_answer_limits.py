"""How much of a provider's answer is taken in: all of a batch's, little of a question's."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.errors import EmbeddingUnavailable

_MEGABYTE = b" " * 2**20
_DIMENSIONS = 4096


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers with so many megabytes of blanks before the vector."""

    protocol_version = "HTTP/1.1"
    megabytes = 0
    sent = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        vector = [0.123456789012345678e-12] * _DIMENSIONS
        body = json.dumps({"data": [{"index": 0, "embedding": vector}], "model": "m", "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(self.megabytes * 2**20 + len(body)))
        self.end_headers()
        try:
            for _ in range(self.megabytes):
                self.wfile.write(_MEGABYTE)
                type(self).sent += 1
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@contextmanager
def _serving(megabytes: int) -> Iterator[tuple[type[_Handler], str]]:
    handler = type("Handler", (_Handler,), {"megabytes": megabytes, "sent": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield handler, f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("megabytes", "one_text", "is_taken"), [(0, True, True), (63, True, False), (8, False, True)])
def test_a_question_limits_the_answer_size_more_than_a_batch(megabytes: int, one_text: bool, is_taken: bool) -> None:
    with _serving(megabytes) as (handler, url):
        embedder = open_embedder(
            "openai",
            credentials={"base_url": url},
            model="m",
            dimensions=_DIMENSIONS,
            one_text_at_a_time=one_text,
        )
        with embedder:
            if is_taken:
                assert embedder.embed_query("x").shape[-1] == _DIMENSIONS
            else:
                with pytest.raises(EmbeddingUnavailable):
                    embedder.embed_query("x")
        if not is_taken:
            assert handler.sent < 16
