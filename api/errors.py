"""Every error code of the contract with its HTTP status, and what becomes of an exception on its way out.

This is the one place where a code gets its status. No message here holds a secret, a row's content or a stack trace.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import IntegrityError
from starlette.exceptions import HTTPException

from embedd_dagster.core.embedded_text import MAX_METADATA_LENGTH
from embedd_dagster.errors import Conflict, EmbeddError, PermanentError, TransientError, ValidationFailed

from .hints import nearest_operation

ERROR_PAGE: Final = "/docs/errors"
_MAX_FAULTS: Final = 5
_MAX_NAME: Final = 80
_MAX_PATH: Final = 300
_log = structlog.get_logger("embedd.api")


class ErrorCode(NamedTuple):
    """The HTTP status of a code, and when it is answered."""

    status: int
    when: str


ERROR_CODES: Final[dict[str, ErrorCode]] = {
    "malformed_request": ErrorCode(400, "What was sent is not HTTP/1.1."),
    "unauthorized": ErrorCode(401, "There is no key in the request, or it is malformed or not known."),
    "key_revoked": ErrorCode(401, "The key was revoked."),
    "permission_denied": ErrorCode(403, "The key may not do this: a `read_only` key reads and queries."),
    "source_table_access_denied": ErrorCode(403, "The source refuses to let us read (in platform mode: write)."),
    "not_found": ErrorCode(404, "There is nothing under this path."),
    "environment_not_found": ErrorCode(404, "No such environment, or it is not this key's."),
    "api_key_not_found": ErrorCode(404, "No such API key."),
    "connection_not_found": ErrorCode(404, "No such connection in this environment."),
    "embedding_provider_not_found": ErrorCode(404, "No such embedding provider in this environment."),
    "vector_table_not_found": ErrorCode(404, "No such vector table in this environment."),
    "task_not_found": ErrorCode(404, "No such task in this environment."),
    "source_table_not_found": ErrorCode(404, "The table, or a configured column, is not in the source."),
    "method_not_allowed": ErrorCode(405, "The path exists, the method does not; `Allow` names those that do."),
    "request_timeout": ErrorCode(408, "The request's head or body did not arrive in time."),
    "name_conflict": ErrorCode(409, "The name is taken in this environment."),
    "environment_conflict": ErrorCode(409, "The environment is still used; the message says by what."),
    "connection_conflict": ErrorCode(409, "The connection is still used; the message says by what."),
    "embedding_provider_conflict": ErrorCode(409, "The embedding provider is still used; the message says by what."),
    "backfill_in_progress": ErrorCode(409, "A backfill, re-backfill or sync is queued or running."),
    "idempotency_key_in_use": ErrorCode(409, "A request with this Idempotency-Key is under way; see `Retry-After`."),
    "sync_already_paused": ErrorCode(409, "Sync is paused already."),
    "sync_not_paused": ErrorCode(409, "Sync is not paused."),
    "mass_delete_refused": ErrorCode(409, "The source looks emptied; mirroring that wants a confirmation."),
    "payload_too_large": ErrorCode(413, "The body is larger than EMBEDD_MAX_BODY_BYTES."),
    "validation_error": ErrorCode(422, "The body or a parameter is not accepted; the message names the field."),
    "connection_not_ready": ErrorCode(422, "The connection has not passed its test."),
    "vector_table_not_ready": ErrorCode(422, "There is no complete set of vectors before the first backfill ends."),
    "value_out_of_range": ErrorCode(422, "A value that its filter_type, or the database of the vectors, cannot hold."),
    "metadata_too_large": ErrorCode(
        422, f"A row's metadata is longer than {MAX_METADATA_LENGTH:,} characters, all columns together."
    ),
    "headers_too_large": ErrorCode(431, "The path and the headers are larger than 64 KiB, or more than 100 headers."),
    "rate_limit_exceeded": ErrorCode(429, "Too many requests with this key; `Retry-After` says how long to wait."),
    "internal_error": ErrorCode(500, "A fault of ours. The service's log has more under the request id."),
    "too_many_queries": ErrorCode(503, "Too many queries are under way; `Retry-After` says how long to wait."),
    "server_busy": ErrorCode(
        503, "Too many connections, large bodies, or requests that wait for databases and providers; see `Retry-After`."
    ),
    "embedding_failed": ErrorCode(502, "The embedding provider failed or refuses; the message says how."),
    "source_unavailable": ErrorCode(503, "The source database does not answer, or cannot do what was asked."),
    "vector_store_unavailable": ErrorCode(503, "The vector store does not answer, or cannot do what was asked."),
    "orchestrator_unavailable": ErrorCode(503, "Dagster does not answer."),
    "catalog_unavailable": ErrorCode(503, "Our own database does not answer."),
}


class ErrorBody(BaseModel):
    """What went wrong, and what to do about it."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="What programs go by", examples=["validation_error"])
    message: str = Field(description="What went wrong, for people", examples=["limit: at most 100 is accepted."])
    resolution: str = Field(description="What to do", examples=["Correct the request."])
    docs_url: str = Field(description="This code's entry in the documentation")
    request_id: str = Field(description="As in the X-Request-Id header", examples=["req_1q3k8zc0v5tq9n2m4x7wb6dhpa"])


class ErrorEnvelope(BaseModel):
    """The body of every answer that is not 2xx."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


_LONGEST_RETRY_AFTER_SECONDS: Final = 3600.0
"""A provider may have asked for ages."""

_ALWAYS: Final = (
    "unauthorized", "key_revoked", "environment_not_found", "payload_too_large", "validation_error",
    "rate_limit_exceeded", "internal_error", "catalog_unavailable",
)  # fmt: skip


def answers(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may answer these codes, besides those that any operation may."""
    by_status: dict[int | str, list[str]] = {}
    for code in dict.fromkeys((*_ALWAYS, *codes)):
        by_status.setdefault(ERROR_CODES[code].status, []).append(code)
    return {
        status: {
            "model": ErrorEnvelope,
            "description": "\n\n".join(f"`{code}`: {ERROR_CODES[code].when}" for code in listed),
        }
        for status, listed in sorted(by_status.items(), key=lambda entry: str(entry[0]))
    }


def error_response(
    scope: Mapping[str, Any],
    code: str,
    message: str,
    resolution: str,
    *,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """The envelope. `extra` stands beside `error`."""
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
    """The envelope as JSON. `base_url` is where the pages of this API are, without a slash at the end."""
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
    """The answer to one of our own errors; only those that say what the user can do keep their message as a 500."""
    headers = {}
    code, message, resolution = error.code, error.message, error.resolution
    if code not in ERROR_CODES:
        code = "internal_error"
    if ERROR_CODES[code].status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("fault", kind=type(error).__name__, message=message)
        if not isinstance(error, PermanentError):
            message, resolution = _INTERNAL
    if ERROR_CODES[code].status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is None and isinstance(error, TransientError):
        retry_after = 5.0
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(min(retry_after, _LONGEST_RETRY_AFTER_SECONDS))))
    return error_response(scope, code, message, resolution, headers=headers)


_INTERNAL: Final = (
    "Something went wrong on our side.",
    "Try again; if it goes on, look at the service's log with the request id.",
)


def internal_error_response(scope: Mapping[str, Any], error: BaseException) -> Response:
    """The answer to a fault nobody foresaw; the log gets its kind and place, not its message, which may hold a row."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
    _log.error("unhandled fault", kind=f"{type(error).__module__}.{type(error).__name__}", where=where)
    return error_response(scope, "internal_error", *_INTERNAL)


def install(app: FastAPI) -> None:
    """Every exception leaves the application as an envelope."""
    app.add_exception_handler(EmbeddError, _on_embedd_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(IntegrityError, _on_integrity_error)


async def _on_embedd_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EmbeddError)  # noqa: S101 - registered for this type
    return response_of(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this type
    return response_of(request.scope, ValidationFailed(_describe(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette and FastAPI refuse by themselves: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    method, path = request.method, request.url.path[:_MAX_NAME]
    if error.status_code == HTTPStatus.NOT_FOUND:
        hint = nearest_operation(request.app.openapi()["paths"], method, request.url.path[:_MAX_PATH])
        resolution = f"Did you mean {hint}? " if hint else ""
        return error_response(
            request.scope,
            "not_found",
            f"There is nothing at {path}.",
            f"{resolution}GET /openapi.json lists every path.",
        )
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = ", ".join(_methods_at(request))
        hint = nearest_operation(request.app.openapi()["paths"], method, request.url.path[:_MAX_PATH])
        meant = f" Did you mean {hint}?" if hint else ""
        return error_response(
            request.scope,
            "method_not_allowed",
            f"{method} is not accepted at {path}.",
            f"Use {allowed}.{meant}" if allowed else "GET /openapi.json lists every method.",
            headers={"Allow": allowed},
        )
    return response_of(request.scope, ValidationFailed("The request could not be read."))


def _methods_at(request: Request) -> list[str]:
    """Every method of the path; Starlette knows only those of the first route that it fits."""
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
    """Two requests at once, such as the deletion of a connection while a vector table is made on it."""
    diagnosis = getattr(getattr(error, "orig", None), "diag", None)
    constraint = str(getattr(diagnosis, "constraint_name", ""))
    for column, (code, noun) in _REFERENCED.items():
        if constraint.startswith("fk_") and constraint.endswith(column):
            conflict = Conflict(
                f"The {noun} was deleted, or came into use, at the same moment.",
                code=code,
                resolution="Look at what there is now, and try again.",
            )
            return response_of(request.scope, conflict)
    return internal_error_response(request.scope, error)


_FAULTS: Final = {
    "missing": "required",
    "string_type": "a text is expected",
    "int_type": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_from_float": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "bool_parsing": "true or false is expected",
    "list_type": "a list is expected",
    "dict_type": "an object is expected",
    "model_type": "an object is expected",
    "model_attributes_type": "an object is expected",
    "literal_error": "{expected} is accepted",
    "string_too_long": "at most {max_length} characters are accepted",
    "string_too_short": "at least {min_length} character is needed",
    "too_long": "at most {max_length} are accepted",
    "too_short": "at least {min_length} is needed",
    "greater_than_equal": "at least {ge} is accepted",
    "less_than_equal": "at most {le} is accepted",
    "greater_than": "more than {gt} is accepted",
    "string_pattern_mismatch": "a text of the form {pattern} is accepted",
    "union_tag_invalid": "one of {expected_tags} is accepted",
}


def _describe(faults: Sequence[Any]) -> str:
    """The faults for people: where, and what is accepted; never what was given, which may be a secret."""
    described = list(dict.fromkeys(f"{_place(fault['loc'])}: {_fault(fault)}" for fault in faults))
    more = f"; and {len(described) - _MAX_FAULTS} more" if len(described) > _MAX_FAULTS else ""
    return "; ".join(described[:_MAX_FAULTS]) + more + "."


def _fault(fault: Mapping[str, Any]) -> str:
    template = _FAULTS.get(fault["type"])
    if template is not None:
        return template.format(**fault.get("ctx", {}))
    message = str(fault["msg"]).removeprefix("Value error, ").rstrip(".")
    return message[:1].lower() + message[1:]


def _place(location: Sequence[int | str]) -> str:
    source, *parts = location
    if not parts:
        return str(source)
    place = ""
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith("~"):  # which variant of a field was taken says nothing to anybody
            place += f"{'.' if place else ''}{str(part)[:_MAX_NAME]}"
    return place


ERROR_PAGE_STYLE: Final = (
    "body{font:1rem/1.5 system-ui;margin:2rem auto;max-width:60rem}td,th{padding:.3rem .8rem;text-align:left;"
    "vertical-align:top}tr:target{background:#ffefc0}"
)


def error_page() -> str:
    """The page that `docs_url` leads to."""
    rows = "".join(
        f'<tr id="{code}"><td><code>{code}</code></td><td>{entry.status}</td><td>{html.escape(entry.when)}</td></tr>'
        for code, entry in ERROR_CODES.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>embedd: error codes</title>"
        f"<style>{ERROR_PAGE_STYLE}</style><h1>Error codes</h1>"
        f"<table><tr><th>code<th>HTTP<th>when</tr>{rows}</table></html>"
    )
