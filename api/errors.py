"""Every exception leaves the application as an error envelope.

No message here holds a secret, the content of a row or a stack trace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from embedd_dagster.errors import Conflict, EmbeddError, PermanentError, TransientError, ValidationFailed

from .error_codes import ERROR_CODES, ERROR_PAGE
from .hints import nearest_operation
from .validation_messages import describe_errors

_MAX_SHOWN: Final = 80
_MAX_PATH: Final = 300
_DEFAULT_RETRY_AFTER_SECONDS: Final = 5.0
_MAX_RETRY_AFTER_SECONDS: Final = 3600.0
"""A provider may ask for days."""
_INTERNAL: Final = (
    "The service failed.",
    "Try again. If it fails again, look up the request id in the log of the service.",
)
_log = structlog.get_logger("embedd.api")


def error_response(
    scope: Mapping[str, Any],
    code: str,
    message: str,
    resolution: str,
    *,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """The response with this code. `extra` is added to the body next to `error`."""
    request_id = scope.get("state", {}).get("request_id", "")
    body = envelope(code, message, resolution, base_url=_base_url(scope), request_id=request_id, extra=extra)
    return Response(body, status_code=ERROR_CODES[code].status, headers=headers, media_type="application/json")


def envelope(
    code: str,
    message: str,
    resolution: str,
    *,
    base_url: str,
    request_id: str,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The error envelope as JSON. `base_url` is the address of this API, without a slash at the end."""
    error = {
        "code": code,
        "message": message,
        "resolution": resolution,
        "docs_url": f"{base_url}{ERROR_PAGE}#{code}",
        "request_id": request_id,
    }
    return orjson.dumps({"error": error, **(extra or {})})


def _base_url(scope: Mapping[str, Any]) -> str:
    configured = scope["app"].state.embedd.settings.api_url if "app" in scope else None
    return (configured or str(Request(dict(scope)).base_url)).rstrip("/")


def response_of(scope: Mapping[str, Any], error: EmbeddError) -> Response:
    """The response for one of our own errors. A 500 keeps its message only if the user can do something about it."""
    headers = {}
    code, message, resolution = error.code, error.message, error.resolution
    if code not in ERROR_CODES:
        code = "internal_error"
    if ERROR_CODES[code].status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request failed", kind=type(error).__name__, message=message)
        if not isinstance(error, PermanentError):
            message, resolution = _INTERNAL
    if ERROR_CODES[code].status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is None and isinstance(error, TransientError):
        retry_after = _DEFAULT_RETRY_AFTER_SECONDS
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(min(retry_after, _MAX_RETRY_AFTER_SECONDS))))
    return error_response(scope, code, message, resolution, headers=headers)


def internal_error_response(scope: Mapping[str, Any], error: BaseException) -> Response:
    """The response for an unexpected exception. Logs its type and line, not its message, which may contain a row."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
    _log.error("unexpected exception", kind=f"{type(error).__module__}.{type(error).__name__}", where=where)
    return error_response(scope, "internal_error", *_INTERNAL)


def install(app: FastAPI) -> None:
    """Registers the handlers that answer exceptions with an error envelope."""
    app.add_exception_handler(EmbeddError, _on_embedd_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(IntegrityError, _on_integrity_error)


async def _on_embedd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EmbeddError)  # noqa: S101 - registered for this type
    return response_of(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
    return response_of(request.scope, ValidationFailed(describe_errors(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI reject themselves: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    method, path = request.method, request.url.path[:_MAX_SHOWN]
    if error.status_code == HTTPStatus.NOT_FOUND:
        hint = nearest_operation(request.app.openapi()["paths"], method, request.url.path[:_MAX_PATH])
        resolution = f"Did you mean {hint}? " if hint else ""
        return error_response(
            request.scope,
            "not_found",
            f"Nothing exists at {path}.",
            f"{resolution}GET /openapi.json lists all paths.",
        )
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_methods_at(request))
        hint = nearest_operation(request.app.openapi()["paths"], method, request.url.path[:_MAX_PATH])
        meant = f" Did you mean {hint}?" if hint else ""
        return error_response(
            request.scope,
            "method_not_allowed",
            f"{method} is not accepted at {path}.",
            f"Use {allowed}.{meant}" if allowed else "GET /openapi.json lists all methods.",
            headers={"Allow": allowed},
        )
    return response_of(request.scope, ValidationFailed("The request could not be read."))


def _methods_at(request: Request) -> list[str]:
    """All methods of the path. Starlette reports only those of the first route that matches."""
    known: set[str] = set()
    for template, operations in request.app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), request.url.path):
            known.update(method.upper() for method in operations)
    return sorted(known)


_REFERENCED: Final = {
    "connection_id": ("connection_conflict", "connection"),
    "embedding_provider_id": ("embedding_provider_conflict", "embedding provider"),
    "environment_id": ("environment_conflict", "environment"),
}


async def _on_integrity_error(request: Request, error: Exception) -> Response:
    """Two concurrent requests, such as deleting a connection while a vector table is created on it."""
    diagnosis = getattr(getattr(error, "orig", None), "diag", None)
    constraint = str(getattr(diagnosis, "constraint_name", ""))
    for column, (code, noun) in _REFERENCED.items():
        if constraint.startswith("fk_") and constraint.endswith(column):
            conflict = Conflict(
                f"Another request deleted the {noun}, or started to use it, at the same time.",
                code=code,
                resolution=f"Look at the {noun} as it is now, then try again.",
            )
            return response_of(request.scope, conflict)
    return internal_error_response(request.scope, error)
