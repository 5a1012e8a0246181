"""`Idempotency-Key`: a request that creates or starts something may be sent twice, and takes effect once.

The key is good for one method and path in one environment, and for callers of the same reach. What is compared is the
body, byte for byte. Remembered for 24 hours is what the operation itself decided: its 2xx, and its 404, 409 and 422.
What was refused before it began (401, 403, 413, 429, a body that its schema does not accept) or failed on the way (403
of a source, 5xx) is not: the same key may be sent again. See `catalog/idempotency.py` for how the answer and the effect
are kept together.
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
from .errors import ERROR_CODES, answers, response_of

A = TypeVar("A", bound=BaseModel)

REPLAYED: Final = "Idempotency-Replayed"
_REMEMBERED_REFUSALS: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY)
_PARTS: Final = 3  # a request waits for a source, for a store and for a provider, each
_log = structlog.get_logger("embedd.api")


class Replay(Exception):
    """Not a fault: the request was answered before, and this is how."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("answered before")
        self.answer = answer


class Attempt:
    """One request to an operation that may be sent twice; the operation does its work inside of `with attempt:`.

    Without the header nothing of this costs anything.
    """

    def __init__(self, caller: Caller, request: Request, key: str | None, request_hash: bytes) -> None:
        self._caller = caller
        self._route: Any = request.scope["route"]
        # and the caller's reach: what an organization's key was given is not for one of a single environment
        self._operation = f"{request.method} {request.scope['path']} {caller.only_environment_id or ''}".strip()
        self._key = key
        self._request_hash = request_hash
        self._claim: Claim | None = None

    def of_caller_alone(self, caller: Caller) -> Attempt:
        """The attempt, whose answer no other key gets, because it holds a secret."""
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
                lease=timedelta(seconds=_PARTS * self._caller.state.settings.request_timeout_seconds),
            )
        if not isinstance(found, Claim):
            raise Replay(found)
        self._claim = found

    def answer(self, session: Session, body: A, *, more_follows: bool = False) -> A:
        """The body, which is kept for the next request with the same key in the transaction that does the work.

        With `more_follows` a better one comes, unless this process dies before. Raises KeyInUse where this has taken so
        long that another request with the key has taken over: the transaction must not be committed then.
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
        """Keeps a refusal; gives the key back where the work was not done."""
        if self._claim is None or error is None:
            return
        runtime = self._caller.state.runtime
        try:
            with runtime.catalog.transaction() as session:
                if isinstance(error, EmbeddError) and _is_remembered(error):
                    kept = {"code": error.code, "message": error.message, "resolution": error.resolution}
                    idempotency.keep_refusal(session, runtime.box, self._claim, kept)
                else:
                    idempotency.give_up(session, self._claim)
        except CatalogUnavailable:
            _log.warning("idempotency key not given back", until="its lease is over")


def _is_remembered(error: EmbeddError) -> bool:
    known = ERROR_CODES.get(error.code)
    return known is not None and known.status in _REMEMBERED_REFUSALS


async def _begin(
    request: Request,
    caller: Writer,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[\x20-\x7e]*[\x21-\x7e][\x20-\x7e]*$",
            description="Any text that no other request has, such as a UUID. Sent again within 24 hours, the same request is "
            "not executed again: it gets the first one's answer, with `Idempotency-Replayed: true`. With another body, "
            "byte for byte, it is a 422; while the first one is under way, a 409.",
            examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
        ),
    ] = None,
) -> Attempt:
    body_hash = b"" if idempotency_key is None else hashlib.sha256(await request.body()).digest()
    return Attempt(caller, request, idempotency_key, body_hash)


Once = Annotated[Attempt, Depends(_begin)]
"""The attempt of a caller whose key has permission `full`."""


def _for_one_key(caller: Writer, attempt: Once) -> Attempt:
    return attempt.of_caller_alone(caller)


OncePerKey = Annotated[Attempt, Depends(_for_one_key)]
"""The same for an answer with a secret in it: the same Idempotency-Key of another API key is another request."""


def answers_once(status: int, *codes: str) -> dict[int | str, dict[str, Any]]:
    """As `answers`, of an operation that takes an Idempotency-Key and answers this status when all is well."""
    header = {"description": "`true`: this is the answer to an earlier request", "schema": {"type": "string"}}
    return {status: {"headers": {REPLAYED: header}}, **answers("idempotency_key_in_use", *codes)}


def install(app: FastAPI) -> None:
    """An answer that is known already leaves the application as it did the first time."""
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
