"""Every error code of the API: its HTTP status, what it means, and how the OpenAPI document describes it.

A code has its status here and nowhere else.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from embedd_dagster.core.embedded_text import MAX_METADATA_LENGTH

ERROR_PAGE: Final = "/docs/errors"


class ErrorCode(NamedTuple):
    """The HTTP status of a code, and when the API answers with it."""

    status: int
    when: str


ERROR_CODES: Final[dict[str, ErrorCode]] = {
    "malformed_request": ErrorCode(400, "The bytes sent are not an HTTP/1.1 request."),
    "unauthorized": ErrorCode(401, "The request has no API key, or the key is malformed or unknown."),
    "key_revoked": ErrorCode(401, "The key was revoked."),
    "permission_denied": ErrorCode(403, "The key may not do this: a `read_only` key may only read and query."),
    "source_table_access_denied": ErrorCode(403, "The source does not let us read (in platform mode: write)."),
    "not_found": ErrorCode(404, "Nothing exists at this path."),
    "environment_not_found": ErrorCode(404, "The environment does not exist, or the key is not valid in it."),
    "api_key_not_found": ErrorCode(404, "No such API key."),
    "connection_not_found": ErrorCode(404, "No such connection in this environment."),
    "embedding_provider_not_found": ErrorCode(404, "No such embedding provider in this environment."),
    "vector_table_not_found": ErrorCode(404, "No such vector table in this environment."),
    "task_not_found": ErrorCode(404, "No such task in this environment."),
    "source_table_not_found": ErrorCode(404, "The source does not have the table, or a configured column."),
    "method_not_allowed": ErrorCode(405, "The path does not accept this method; `Allow` lists the methods it accepts."),
    "request_timeout": ErrorCode(408, "The headers or the body of the request did not arrive in time."),
    "name_conflict": ErrorCode(409, "The name is already used in this environment."),
    "environment_conflict": ErrorCode(409, "The environment is in use; the message says by what."),
    "connection_conflict": ErrorCode(409, "The connection is in use; the message says by what."),
    "embedding_provider_conflict": ErrorCode(409, "The embedding provider is in use; the message says by what."),
    "backfill_in_progress": ErrorCode(409, "A backfill, re-backfill or sync is queued or running."),
    "idempotency_key_in_use": ErrorCode(409, "A request with this Idempotency-Key is in progress; see `Retry-After`."),
    "sync_already_paused": ErrorCode(409, "Sync is already paused."),
    "sync_not_paused": ErrorCode(409, "Sync is not paused."),
    "mass_delete_refused": ErrorCode(
        409, "Most rows are missing from the source; deleting their vectors needs a confirmation."
    ),
    "payload_too_large": ErrorCode(413, "The body is larger than EMBEDD_MAX_BODY_BYTES."),
    "validation_error": ErrorCode(422, "The body or a parameter is not valid; the message names the field."),
    "connection_not_ready": ErrorCode(422, "The connection has not passed its test."),
    "vector_table_not_ready": ErrorCode(422, "The vector table has no live vectors before its first backfill ends."),
    "value_out_of_range": ErrorCode(422, "The filter_type, or the database of the vectors, cannot hold a value."),
    "metadata_too_large": ErrorCode(
        422, f"The metadata of a row is longer than {MAX_METADATA_LENGTH:,} characters, all columns together."
    ),
    "headers_too_large": ErrorCode(431, "Path and headers are larger than 64 KiB, or there are over 100 headers."),
    "rate_limit_exceeded": ErrorCode(429, "Too many requests with this key; `Retry-After` says how long to wait."),
    "internal_error": ErrorCode(500, "The service failed. Its log has more under the request id."),
    "too_many_queries": ErrorCode(503, "Too many queries are in progress; `Retry-After` says how long to wait."),
    "server_busy": ErrorCode(
        503, "Too many connections, large bodies, or requests that wait for databases and providers; see `Retry-After`."
    ),
    "embedding_failed": ErrorCode(502, "The embedding provider failed or rejected the request; the message says how."),
    "source_unavailable": ErrorCode(503, "The source database does not answer, or cannot do what was asked."),
    "vector_store_unavailable": ErrorCode(503, "The vector store does not answer, or cannot do what was asked."),
    "orchestrator_unavailable": ErrorCode(503, "Dagster does not answer."),
    "catalog_unavailable": ErrorCode(503, "The catalog database does not answer."),
}

_ANY_OPERATION: Final = (
    "unauthorized", "key_revoked", "environment_not_found", "payload_too_large", "validation_error",
    "rate_limit_exceeded", "internal_error", "catalog_unavailable",
)  # fmt: skip


class ErrorBody(BaseModel):
    """What went wrong, and what to do about it."""

    model_config = ConfigDict(extra="forbid")

    code: str = Field(description="Identifies the error for programs", examples=["validation_error"])
    message: str = Field(description="What went wrong, for people", examples=["limit: at most 100 is accepted."])
    resolution: str = Field(description="What to do", examples=["Correct the request."])
    docs_url: str = Field(description="The entry of this code in the documentation")
    request_id: str = Field(description="As in the X-Request-Id header", examples=["req_1q3k8zc0v5tq9n2m4x7wb6dhpa"])


class ErrorEnvelope(BaseModel):
    """The body of every response that is not 2xx."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may answer these codes, and those that any operation may answer."""
    by_status: dict[int | str, list[str]] = {}
    for code in dict.fromkeys((*_ANY_OPERATION, *codes)):
        by_status.setdefault(ERROR_CODES[code].status, []).append(code)
    return {
        status: {
            "model": ErrorEnvelope,
            "description": "\n\n".join(f"`{code}`: {ERROR_CODES[code].when}" for code in listed),
        }
        for status, listed in sorted(by_status.items(), key=lambda entry: str(entry[0]))
    }
