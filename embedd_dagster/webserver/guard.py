"""A login and a same-origin rule before an ASGI application that has neither.

What passes, in the order in which it is asked:

- the `Host` is a loopback name or one that was configured: against DNS rebinding
- what changes something is a POST of JSON: a form, an image or a link cannot be one. `/graphql` is never read by GET
- a request caused by a page of another origin is rejected, except opening our page as a page of its own
- the session's cookie, or the token itself as `Authorization: Bearer …`, for programs; for every path, files too
- a WebSocket that comes by cookie names our own origin
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import parse_qs, quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedd_dagster.webserver import origins
from embedd_dagster.webserver.pages import forward_page, login_page
from embedd_dagster.webserver.sessions import SESSION_SECONDS, Sessions

HEALTH_PATH: Final = "/_guard/health"
LOGIN_PATH: Final = "/login"
_FORM_LIMIT_BYTES: Final = 4096
_POLICY_VIOLATION: Final = 1008
_SECURITY_HEADERS: Final = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """The request does not pass; the message is for its sender."""

    def __init__(self, status_code: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code


class Guard:
    """Stands before the application and lets through what may pass."""

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Collection[str] = (), now: Callable[[], float] = time.time
    ) -> None:
        """`hosts` are the names, besides the loopback ones, under which browsers and programs reach it."""
        self._app = app
        self._sessions = Sessions(token)
        self._hosts = origins.LOOPBACK_NAMES | {host.lower() for host in hosts}
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        match scope["type"]:
            case "http":
                await self._serve_http(scope, receive, send)
            case "websocket":
                await self._serve_websocket(scope, receive, send)
            case "lifespan":
                await self._app(scope, receive, send)
            case other:
                raise RuntimeError(f"unknown ASGI scope type {other!r}")

    async def _serve_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _with_security_headers(send)
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except Refused as refusal:
            answer = _refusal_response(refusal)
        if answer is None:
            await self._app(scope, receive, send)
        else:
            await answer(scope, receive, send)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        try:
            self._check_host(connection.headers)
            _check_origin(connection.headers)
            self._check_identity(connection, origin_required=True)
        except Refused as refusal:
            # before the handshake is accepted, the server makes this a plain 403
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.code})
            return
        await self._app(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """The guard's own answer; None if the application gives it. Raises Refused."""
        headers, path = request.headers, str(request.scope["path"])
        self._check_host(headers)
        if path == HEALTH_PATH:
            return JSONResponse({"status": "ok"})
        is_read = request.method in ("GET", "HEAD")
        _check_origin(headers, navigation_allowed=is_read)
        if path == LOGIN_PATH:
            return await self._log_in(request)
        _check_method(request, is_read=is_read)
        try:
            self._check_identity(request, origin_required=not is_read)
        except Refused as refusal:
            if refusal.code != "not_signed_in" or not is_read or "text/html" not in headers.get("accept", ""):
                raise
            if origins.is_from_elsewhere(headers):
                # Another site's link comes without the cookie (SameSite=Strict), our own page's next step with it.
                return forward_page(_path_and_query(request))
            return login_page(_path_and_query(request))
        return None

    async def _log_in(self, request: Request) -> Response:
        if request.method == "POST":
            fields = await _read_form(request)
        elif request.method in ("GET", "HEAD"):
            fields = dict(request.query_params)
        else:
            raise Refused(405, "method_not_allowed", "Sign in by GET or POST.")
        token, next_path = fields.get("token"), _own_path(fields.get("next", "/"))
        if token is None:
            return login_page(next_path)
        if not self._sessions.is_token(token):
            return login_page(next_path, wrong_token=True)
        response = RedirectResponse(next_path, 303) if request.method == "POST" else forward_page(next_path)
        forwarded_scheme = request.headers.get("x-forwarded-proto", "")  # good or bad, it only concerns its sender
        response.set_cookie(
            self._sessions.cookie_name,
            self._sessions.issue(self._now()),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure="https" in (request.url.scheme, forwarded_scheme),
        )
        return response

    def _check_host(self, headers: Headers) -> None:
        if not origins.are_unambiguous(headers):
            raise Refused(400, "ambiguous_headers", "A header that matters here comes more than once.")
        if not origins.is_host_allowed(headers, self._hosts):
            raise Refused(
                403,
                "host_not_allowed",
                "This name is not one of this server's. If it should be, add it to EMBEDD_DAGSTER_HOSTS.",
            )

    def _check_identity(self, connection: HTTPConnection, *, origin_required: bool) -> None:
        authorization = connection.headers.get("authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not self._sessions.is_token(token.strip()):
                raise Refused(401, "wrong_token", "That is not this installation's EMBEDD_DAGSTER_TOKEN.")
            return
        cookie = connection.cookies.get(self._sessions.cookie_name)
        if cookie is None or not self._sessions.accepts(cookie, self._now()):
            raise Refused(
                401,
                "not_signed_in",
                "Sign in at /login with this installation's EMBEDD_DAGSTER_TOKEN, or send it as Authorization: Bearer.",
            )
        if origin_required and "origin" not in connection.headers:
            raise Refused(403, "origin_missing", "A session's request names its origin, as browsers do.")


def _check_method(request: Request, *, is_read: bool) -> None:
    if is_read:
        if str(request.scope["path"]).strip("/").lower() == "graphql":
            raise Refused(405, "method_not_allowed", "GraphQL is asked by POST, with a body of JSON.")
        return
    if request.method != "POST":
        raise Refused(405, "method_not_allowed", "Only GET, HEAD and POST.")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "not_json", "Send the body as application/json.")


def _check_origin(headers: Headers, *, navigation_allowed: bool = False) -> None:
    is_foreign = origins.is_origin_foreign(headers)
    if not is_foreign and origins.is_from_elsewhere(headers):
        is_foreign = not (navigation_allowed and origins.is_navigation(headers))
    if is_foreign:
        raise Refused(403, "cross_origin", "A page of another origin may not do this.")


async def _read_form(request: Request) -> dict[str, str]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise Refused(415, "not_a_form", "Send the token as a form.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _FORM_LIMIT_BYTES:
            raise Refused(413, "too_large", "A token is not that long.")
    fields = parse_qs(body.decode("utf-8", "replace"))
    return {name: values[-1] for name, values in fields.items()}


def _own_path(path: str) -> str:
    """The path if it stays on this server, otherwise the root."""
    is_own = path.startswith("/") and not path.startswith("//") and path.isascii() and path.isprintable()
    return path if is_own and "\\" not in path else "/"


def _path_and_query(request: Request) -> str:
    query = request.url.query
    return _own_path(quote(str(request.scope["path"])) + (f"?{query}" if query else ""))


def _refusal_response(refusal: Refused) -> Response:
    headers = {"Cache-Control": "no-store"}
    if refusal.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(
        {"error": {"code": refusal.code, "message": str(refusal)}}, status_code=refusal.status_code, headers=headers
    )


def _with_security_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_SECURITY_HEADERS)
            # in addition to the application's own policy: a browser obeys both
            headers.append("Content-Security-Policy", "frame-ancestors 'none'")
            if headers.get("Referrer-Policy") != "same-origin":
                headers["Referrer-Policy"] = "no-referrer"
            headers.setdefault("Cache-Control", "private, no-cache")
        await send(message)

    return send_with_headers
