"""One tiny embeddings API under servers of other projects: gunicorn, Flask, `http.server`, uvicorn and FastAPI.

Each of them ends connections and answers differently. `running_foreign_server("gunicorn_sync")` starts one in a
separate process. A vector identifies its text (`vector_of`), and has the requested dimensions, 1536 by default.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import numpy as np
import orjson
import pydantic

_REPOSITORY = Path(__file__).parents[2]
_JSON = [("Content-Type", "application/json")]
_START_SECONDS = 60.0


def vector_of(text: str, dimensions: int) -> np.ndarray:
    """The vector that the servers give for a text such as "text 17"."""
    vector = np.full(dimensions, 0.5, dtype="<f4")
    number = text.rsplit(" ", 1)[-1]
    vector[0] = float(number) if number.isdigit() else 0.25
    return vector


def answer(body: bytes) -> bytes:
    """The answer to a request of the embeddings protocol."""
    request = orjson.loads(body)
    dimensions = request.get("dimensions", 1536)
    data = [
        {"index": index, "embedding": base64.b64encode(vector_of(text, dimensions).tobytes()).decode()}
        for index, text in enumerate(request["input"])
    ]
    return orjson.dumps({"object": "list", "data": data, "usage": {"prompt_tokens": len(data)}})


def wsgi_application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """As a WSGI application: the server decides whether there is a Content-Length."""
    content = answer(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    with_length = environ["PATH_INFO"].startswith("/with-length")
    start_response("200 OK", _JSON + ([("Content-Length", str(len(content)))] if with_length else []))
    # a list of one would let the server know the length
    return (part for part in (content[:1000], content[1000:]))


async def asgi_application(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """As an ASGI application, with Content-Length."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    content = answer(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class _Handler(http.server.BaseHTTPRequestHandler):
    """HTTP/1.0 without Content-Length: the end of the connection is the end of the answer."""

    def do_POST(self) -> None:
        content = answer(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        pass


def _serve_http_server(port: int) -> None:
    http.server.ThreadingHTTPServer(("127.0.0.1", port), _Handler).serve_forever()


def _serve_flask(port: int) -> None:
    import flask

    application = flask.Flask("provider")

    @application.post("/<path:_path>")
    def _embeddings(_path: str) -> flask.Response:
        return flask.Response(answer(flask.request.get_data()), content_type="application/json")

    application.run("127.0.0.1", port)


class _StrictBody(pydantic.BaseModel, extra="forbid"):
    model: str
    input: list[str]


def _serve_fastapi(port: int) -> None:
    """Takes `model` and `input` alone; every other field is refused by pydantic's list of errors."""
    import uvicorn
    from fastapi import FastAPI, Response

    application = FastAPI()

    @application.post("/v1/embeddings")
    def _embeddings(body: _StrictBody) -> Any:
        return Response(answer(body.model_dump_json().encode()), media_type="application/json")

    uvicorn.run(application, port=port, log_level="error")


_GUNICORN = [sys.executable, "-m", "gunicorn", "tests.support.foreign_servers:wsgi_application", "--log-level=error"]
_UVICORN = [sys.executable, "-m", "uvicorn", "tests.support.foreign_servers:asgi_application", "--log-level=error"]
_OWN = [sys.executable, "-m", "tests.support.foreign_servers"]
_COMMANDS: dict[str, Callable[[int], list[str]]] = {
    # closes the connection after each answer
    "gunicorn_sync": lambda port: [*_GUNICORN, f"--bind=127.0.0.1:{port}"],
    # keeps connections open, and ends a worker with all its connections after three requests
    "gunicorn_gthread": lambda port: [*_GUNICORN, f"--bind=127.0.0.1:{port}", "--threads=4", "--max-requests=3"],
    "flask": lambda port: [*_OWN, "flask", str(port)],
    "http_server": lambda port: [*_OWN, "http_server", str(port)],
    "fastapi": lambda port: [*_OWN, "fastapi", str(port)],
    # ends after the third answer
    "uvicorn_of_three_requests": lambda port: [*_UVICORN, f"--port={port}", "--limit-max-requests=3"],
}
FOREIGN_SERVERS = tuple(_COMMANDS)


@contextlib.contextmanager
def running_foreign_server(name: str) -> Iterator[str]:
    """The URL of one of `FOREIGN_SERVERS`, in a separate process that is stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # in a separate session: gunicorn's workers are ended together with it
    with subprocess.Popen(
        _COMMANDS[name](port), cwd=_REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_until_it_listens(process, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _is_listening(port):
        assert process.poll() is None, "the server ended before it was ready"
        assert time.monotonic() < deadline, "the server does not listen"
        time.sleep(0.05)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    {"flask": _serve_flask, "http_server": _serve_http_server, "fastapi": _serve_fastapi}[sys.argv[1]](int(sys.argv[2]))
