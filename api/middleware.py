"""What every request gets around its endpoint: an id, a log line, a limited body, and an envelope for any exception."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, Final

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedd_dagster.catalog.clock import new_id
from embedd_dagster.deadlines import deadline
from embedd_dagster.engine.search import StageSeconds

from .errors import error_response, internal_error_response
from .rate_limit import RateLimit

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_GRACE_SECONDS: Final = 1.0
_SMALL_BODY: Final = 64 * 2**10  # as much as the server itself buffers
_ALL_BODIES_BYTES: Final = 64 * 2**20
_ALL_BODIES_MIN_COUNT: Final = 4
_DISCARD_BYTES: Final = 16 * 2**20
_DISCARD_SECONDS: Final = 2.0
_log = structlog.get_logger("embedd.api")


class RequestContext:
    """Gives every request an id, a deadline and a log line, and every response its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                used = state.get("rate_limit")
                if isinstance(used, RateLimit):
                    headers.update(used.headers)
                stages = state.get("stages")
                if isinstance(stages, StageSeconds):
                    headers["Server-Timing"] = _server_timing(stages, time.perf_counter() - begun)
            await send(message)

        timeout = scope["app"].state.embedd.settings.request_timeout_seconds
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            # a little more, so that the timeout of a server comes first, with its own message
            deadline(timeout + _GRACE_SECONDS),
        ):
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as error:  # noqa: BLE001 - the server would log a stack trace
                response = internal_error_response(scope, error)
                if status == 0:
                    await response(scope, receive, send_with_headers)
            finally:
                seconds = time.perf_counter() - begun
                _measure(scope, status, seconds)
                _log.info(
                    "request",
                    method=scope["method"],
                    # the name of the operation: a path may contain anything
                    operation=getattr(scope.get("route"), "name", None),
                    status=status,
                    duration_ms=round(seconds * 1000, 1),
                    key=state.get("key_prefix"),
                )


def _server_timing(stages: StageSeconds, total: float) -> str:
    """The time of each stage of a query, in milliseconds. The rest of the total is the API's."""
    parts = {"catalog": stages.catalog, "embed": stages.embed, "search": stages.search, "total": total}
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in parts.items())


def _measure(scope: Scope, status: int, seconds: float) -> None:
    template = getattr(scope.get("route"), "path", None)
    # some versions of FastAPI leave out the prefix that the router was included with
    if template is not None and scope["path"].startswith("/v1/") and not template.startswith("/v1/"):
        template = f"/v1{template}"
    scope["app"].state.embedd.metrics.request(scope["method"], template, status, seconds)


@dataclass(slots=True)
class BodyBudget:
    """Bytes of all bodies together that may be in memory, not counting the first 64 KiB of each."""

    left: int


class BodyShare:
    """The part of the budget that one request uses."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._used = 0

    def grow(self, size: int) -> bool:
        """Reserves what a body of this size needs; False if the budget does not have it."""
        more = max(0, size - _SMALL_BODY) - self._used
        if more > self._budget.left:
            return False
        self._budget.left -= more
        self._used += more
        return True

    def release(self) -> None:
        """Returns everything to the budget. Idempotent."""
        self._budget.left += self._used
        self._used = 0


async def _discard(receive: Receive) -> None:
    """Reads and discards the rest of a body, up to a limit: a client that is still sending does not read the response."""
    seen = 0
    with anyio.move_on_after(_DISCARD_SECONDS):
        while seen < _DISCARD_BYTES:
            message = await receive()
            seen += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


class BodyLimit:
    """Reads the body before it calls the application. Rejects a body that is too large, by its announced or real size.

    All bodies together are limited too: a large body that exceeds that limit gets a 503.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._budget = BodyBudget(max(_ALL_BODIES_BYTES, _ALL_BODIES_MIN_COUNT * max_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:18]) > self._max_bytes:
            await self._reject(scope, receive, send)
            return
        share = BodyShare(self._budget)
        try:
            body = await self._read(scope, receive, send, share)
            if body is not None:
                await self._call_application(bytes(body), scope, receive, send)
        finally:
            share.release()

    async def _read(self, scope: Scope, receive: Receive, send: Send, share: BodyShare) -> bytearray | None:
        """The whole body; None if it was rejected or the client has disconnected."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                await self._reject(scope, receive, send)
                return None
            if not share.grow(len(body)):
                await self._reject_as_busy(scope, receive, send)
                return None
            if not message.get("more_body", False):
                return body

    async def _call_application(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        delivered = False

        async def receive_again() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_again, send)

    async def _reject_as_busy(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(
            scope,
            "server_busy",
            "The service is receiving too many large bodies.",
            "Wait as long as Retry-After says.",
            headers={"Connection": "close", "Retry-After": "1"},
        )
        await response(scope, receive, send)

    async def _reject(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _discard(receive)
        response = error_response(
            scope,
            "payload_too_large",
            f"body: at most {self._max_bytes} bytes are accepted.",
            "Send a smaller body.",
            headers={"Connection": "close"},
        )
        await response(scope, receive, send)
