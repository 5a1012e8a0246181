"""`Idempotency-Key`: a request that creates or starts something may be sent twice and takes effect once.

A key counts for one method and path in one environment, and for callers with the same access. The second request must have the
same body, byte for byte. The result of the operation is kept for 24 hours: its 2xx, and its 404, 409 and 422. Not kept are
rejections before the operation began (401, 403, 413, 429, an invalid body) and failures (403 of a source, 5xx): the same key may
be sent again. `catalog/idempotency.py` explains how the result is stored together with the effect.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from http import HTTPStatus
from types import TracebackType
from typing import Annotated, Any, Final, TypeVar

import structlog
from fastapi import Depends, FastAPI, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from embedd_dagster.catalog import idempotency
from embedd_dagster.catalog.idempotency import Claim
from embedd_dagster.errors import CatalogUnavailable, EmbeddError

from .auth import Caller, Writer
from .error_codes import ERROR_CODES, error_responses
from .errors import response_of

A = TypeVar("A", bound=BaseModel)

REPLAYED: Final = "Idempotency-Replayed"
_KEPT_ERRORS: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY)
_EXTERNAL_SYSTEMS: Final = 3  # a request waits for a source, a store and a provider, each with the request timeout
_log = structlog.get_logger("embedd.api")


class Replay(Exception):
    """Not an error: an earlier request with this key has this answer."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("answered by an earlier request")
        self.answer = answer


class IdempotentRequest:
    """A request to an operation that takes an Idempotency-Key. The operation does its work inside `with idempotent:`.

    A request without the header costs no access to the catalog.
    """

    def __init__(self, caller: Caller, request: Request, key: str | None, request_hash: bytes) -> None:
        self._caller = caller
        self._route: Any = request.scope["route"]
        # with the environment of the key: the answer to a key of the organization is not for a key of one environment
        self._operation = f"{request.method} {request.scope['path']} {caller.only_environment_id or ''}".strip()
        self._key = key
        self._request_hash = request_hash
        self._claim: Claim | None = None

    def for_one_api_key(self, caller: Caller) -> IdempotentRequest:
        """This request, whose answer no other API key gets, because it contains a secret."""
        self._operation += f" {caller.key.id}"
        return self

    def __enter__(self) -> None:
        """Claims the key. Raises Replay, KeyInUse, ValidationFailed."""
        if self._key is None:
            return
        runtime = self._caller.state.runtime
        with runtime.catalog.transaction() as session:
            found = idempotency.claim(
                session,
                runtime.box,
                environment_id=self._caller.environment.id,
                operation=self._operation,
                key=self._key,
                request_hash=self._request_hash,
                lease=timedelta(seconds=_EXTERNAL_SYSTEMS * self._caller.state.settings.request_timeout_seconds),
            )
        if not isinstance(found, Claim):
            raise Replay(found)
        self._claim = found

    def remember(self, session: Session, body: A, *, more_follows: bool = False) -> A:
        """Keeps the body, in the transaction that does the work, for later requests with the same key. Returns it.

        With `more_follows`, a later call replaces it, unless this process dies before. Raises KeyInUse if the lease has
        expired and another request has claimed the key: the transaction must then roll back.
        """
        if self._claim is not None:
            kept = {
                "status": self._route.status_code or HTTPStatus.OK,
                "body": body.model_dump_json(exclude_unset=self._route.response_model_exclude_unset),
            }
            idempotency.keep(session, self._caller.state.runtime.box, self._claim, kept, more_follows=more_follows)
        return body

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keeps a 404, 409 or 422; after any other error, releases the key."""
        if self._claim is None or error is None:
            return
        runtime = self._caller.state.runtime
        try:
            with runtime.catalog.transaction() as session:
                if isinstance(error, EmbeddError) and _is_kept(error):
                    kept = {"code": error.code, "message": error.message, "resolution": error.resolution}
                    idempotency.keep_error(session, runtime.box, self._claim, kept)
                else:
                    idempotency.release(session, self._claim)
        except CatalogUnavailable:
            _log.warning("idempotency key not released", until="its lease expires")


def _is_kept(error: EmbeddError) -> bool:
    known = ERROR_CODES.get(error.code)
    return known is not None and known.status in _KEPT_ERRORS


async def _begin(
    request: Request,
    caller: Writer,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[\x20-\x7e]*[\x21-\x7e][\x20-\x7e]*$",
            description="A text that no other request has, such as a UUID. If the same request is sent again within 24 hours, "
            "it is not executed again: it gets the first answer, with `Idempotency-Replayed: true`. With a different body "
            "(byte for byte) the answer is a 422; while the first request is in progress, a 409.",
            examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
        ),
    ] = None,
) -> IdempotentRequest:
    body_hash = b"" if idempotency_key is None else hashlib.sha256(await request.body()).digest()
    return IdempotentRequest(caller, request, idempotency_key, body_hash)


Idempotent = Annotated[IdempotentRequest, Depends(_begin)]
"""The request of a caller whose key has permission `full`."""


def _for_one_api_key(caller: Writer, idempotent: Idempotent) -> IdempotentRequest:
    return idempotent.for_one_api_key(caller)


IdempotentPerKey = Annotated[IdempotentRequest, Depends(_for_one_api_key)]
"""For an answer with a secret in it: the same Idempotency-Key with another API key is another request."""


def idempotent_responses(status: int, *codes: str) -> dict[int | str, dict[str, Any]]:
    """As `error_responses`, for an operation that takes an Idempotency-Key and answers this status on success."""
    header = {"description": "`true`: this is the answer to an earlier request", "schema": {"type": "string"}}
    return {status: {"headers": {REPLAYED: header}}, **error_responses("idempotency_key_in_use", *codes)}


def install(app: FastAPI) -> None:
    """Registers the handler that sends a kept answer again."""
    app.add_exception_handler(Replay, _on_replay)


async def _on_replay(request: Request, replay: Exception) -> Response:
    assert isinstance(replay, Replay)  # noqa: S101 - registered for this type
    answer = replay.answer
    if "code" in answer:
        response = response_of(request.scope, EmbeddError(**answer))
    else:
        response = Response(answer["body"], status_code=answer["status"], media_type="application/json")
    response.headers[REPLAYED] = "true"
    return response
