"""Qdrant's REST and gRPC protocols over Qdrant Edge, for one machine: the demo, the tests, a laptop.

``python -m embedd_dagster.stack.qdrant.server --data DIR --port N [--grpc-port N]``.

It answers the calls that the Qdrant connector makes in
the real server's form, and refuses the others; production is a real Qdrant. An acknowledged write survives kill -9: it is in
Edge's log before the answer goes out, also with `wait=false`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hmac
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import orjson
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from embedd_dagster import logs
from embedd_dagster.stack.qdrant import wire
from embedd_dagster.stack.qdrant.calls import COLLECTION_HANDLERS, Call
from embedd_dagster.stack.qdrant.collections import QdrantCatalog
from embedd_dagster.stack.qdrant.grpc_service import start_grpc_server
from embedd_dagster.stack.qdrant.point_calls import POINT_HANDLERS
from embedd_dagster.stack.qdrant.strict_mode import RateLimitedError
from embedd_dagster.stack.qdrant.wire import RefusedError

VERSION = "1.20.0"  # of the protocol: clients compare it with their own
MAX_BODY_BYTES = 32 * 1024 * 1024  # Qdrant's `max_request_size_mb`, unless configured

_GRACE_SECONDS = 10
_ALLOCATIONS_A_COLLECTION = 100_000
_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/livez"})
_log = structlog.get_logger(__name__)


def create_app(catalog: QdrantCatalog, api_key: str | None = None, grpc_server: grpc.Server | None = None) -> Starlette:
    """The ASGI application over an opened catalog. At its end it stops `grpc_server`, then closes the catalog."""

    def route(method: str, path: str, handler: Callable[[Call], Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            if api_key is not None and (refusal := _check_key(request, api_key)):
                return refusal
            try:
                call = Call(
                    catalog=catalog,
                    path=request.path_params,
                    wait=request.query_params.get("wait") == "true",
                    raw_body=await _read_body(request),
                )
                content = await run_in_threadpool(lambda: _render(handler(call), started))
            except RateLimitedError as limited:
                wait = limited.retry_after_seconds
                headers = {} if wait is None else {"retry-after": str(wait)}
                return _error(limited.status, limited.message, started, headers)
            except RefusedError as refused:
                return _error(refused.status, refused.message, started)
            return Response(content, media_type="application/json")

        return Route(path, endpoint, methods=[method])

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if grpc_server is not None:
                await run_in_threadpool(lambda: grpc_server.stop(_GRACE_SECONDS).wait())
            await run_in_threadpool(catalog.close)

    async def version(_: Request) -> Response:
        return JSONResponse({"title": "qdrant - vector search engine", "version": VERSION, "commit": ""})

    async def health(request: Request) -> Response:
        ready = request.url.path == "/readyz"
        return PlainTextResponse("all shards are ready" if ready else f"{request.url.path[1:]} check passed")

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return Response(status_code=error.status_code)
        _log.error("request failed", error=f"{type(error).__name__}: {wire.first_line(error)}")
        return _error(500, f"Service internal error: {type(error).__name__}", time.perf_counter())

    routes = [Route("/", version)]
    routes += [Route(path, health) for path in sorted(_OPEN_PATHS - {"/"})]
    routes += [route(method, path, handler) for method, path, handler in COLLECTION_HANDLERS + POINT_HANDLERS]
    return Starlette(
        routes=routes,
        # the real server compresses every answer for clients that accept it
        middleware=[Middleware(GZipMiddleware, minimum_size=1)],
        lifespan=lifespan,
        exception_handlers={HTTPException: failed, Exception: failed},
    )


def _check_key(request: Request, api_key: str) -> Response | None:
    given = request.headers.get("api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
    if not given:
        return PlainTextResponse("Must provide an API key or an Authorization bearer token", 401)
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        return PlainTextResponse("Invalid API key or JWT", 401)
    return None


async def _read_body(request: Request) -> bytes:
    chunks, length = [], 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > MAX_BODY_BYTES:
            raise RefusedError(
                413, f"Format error in JSON body: payload is larger than the limit of {MAX_BODY_BYTES} bytes"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _render(result: Any, started: float) -> bytes:
    return orjson.dumps({"result": result, "status": "ok", "time": time.perf_counter() - started})


def _error(status: int, message: str, started: float, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"status": {"error": message}, "time": time.perf_counter() - started}, status, headers)


def main(arguments: list[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then flushes."""
    parser = argparse.ArgumentParser(prog="qdrant_server", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="the directory to keep everything in")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--grpc-port", type=int, help="without it, there is no gRPC")
    parser.add_argument("--host", default="127.0.0.1")
    options = parser.parse_args(arguments)
    # from the environment: arguments can be seen by every user of the machine
    api_key = os.environ.get("EMBEDD_QDRANT_API_KEY")
    if api_key is not None and not api_key.strip():
        parser.error("EMBEDD_QDRANT_API_KEY is empty. Give it a value, or unset it to serve without a key.")
    logs.lose_unwritable_lines()
    os.umask(0o077)  # the data directory holds rows
    # uvicorn raises the signal that ended it once more when all is closed: an end that was asked for is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    catalog = QdrantCatalog(options.data.absolute())
    catalog.open()
    _log.warning(
        "Qdrant Edge behind Qdrant's protocols: for one machine, demo and tests; not for production",
        data=str(options.data),
        port=options.port,
        grpc_port=options.grpc_port,
    )
    # a body is a thousand lists and dicts that are freed at its end: looking for cycles among them is for nothing
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS_A_COLLECTION, *gc.get_threshold()[1:])
    grpc_server = None
    if options.grpc_port:
        grpc_server = start_grpc_server(catalog, options.host, options.grpc_port, api_key)
    uvicorn.run(
        create_app(catalog, api_key, grpc_server),
        host=options.host,
        port=options.port,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=5,  # as the real server; clients must let go first
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
