"""The catalog of `Idempotency-Key`s: which request works on a key, and what its answer was.

A request claims the row of its key, in a separate transaction, before it does its work. It stores the answer in the transaction
that does the work, so both are committed or neither is. A claim is a lease: after it has expired, another request may claim the
row. The earlier one can then no longer store an answer, which rolls back its work, so no work is done twice. All times are the
database's.

The request is stored as a hash, encrypted like the answer: a hash of a body with a short password could be guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast
from uuid import uuid4

from sqlalchemy import CursorResult, Update, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import database_now
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import IdempotencyKey
from embedd_dagster.errors import Conflict, SecretUnreadable, ValidationFailed

REMEMBERED: Final = timedelta(hours=24)
_PURGED_PER_CLAIM: Final = 20
_TRIES: Final = 3


class KeyInUse(Conflict):
    """Another request with this key is in progress."""

    default_code = "idempotency_key_in_use"
    default_resolution = "Send the request again a little later: it gets the first answer."
    retry_after_seconds = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to do the work and to store its answer, until the lease expires and another request claims the row."""

    row_id: str
    attempt: str


def claim(
    session: Session,
    box: SecretBox,
    *,
    environment_id: str,
    operation: str,
    key: str,
    request_hash: bytes,
    lease: timedelta,
) -> Claim | dict[str, Any]:
    """A claim on the key, or the answer that was kept for it. The operation is a method and a path.

    Raises KeyInUse if another request with the key is in progress, ValidationFailed if the key came with another body.
    """
    scope = hashlib.sha256("\n".join((environment_id, operation, key)).encode())
    claimed = Claim(f"idem_{scope.hexdigest()}", uuid4().hex)
    request = box.seal({"hash": request_hash.hex()}, row_id=claimed.row_id, column="request")
    fresh: dict[str, Any] = {
        "environment_id": environment_id,
        "attempt": claimed.attempt,
        "request": request,
        "answer": None,
        "locked_until": func.clock_timestamp() + lease,
        "expires_at": func.clock_timestamp() + REMEMBERED,
    }
    new = insert(IdempotencyKey).values(id=claimed.row_id, **fresh).on_conflict_do_nothing()
    for _try in range(_TRIES):
        if session.execute(new.returning(IdempotencyKey.id)).scalar() is not None:
            break
        row = session.get(IdempotencyKey, claimed.row_id, with_for_update=True, populate_existing=True)
        if row is None:  # released just now
            continue
        answer = _answer_of(session, box, row, request_hash)
        if answer is not None:
            return answer
        session.execute(update(IdempotencyKey).where(IdempotencyKey.id == claimed.row_id).values(**fresh))
        break
    else:
        raise KeyInUse("Idempotency-Key: other requests with this key are in progress.")
    _purge(session)
    return claimed


def _answer_of(session: Session, box: SecretBox, row: IdempotencyKey, request_hash: bytes) -> dict[str, Any] | None:
    """The stored answer; None if the row may be claimed: it is too old, its lease has expired, or no key decrypts it."""
    instant = database_now(session)
    if row.expires_at <= instant:
        return None
    try:
        known = box.open(row.request, row_id=row.id, column="request")
        answer = None if row.answer is None else box.open(row.answer, row_id=row.id, column="answer")
    except SecretUnreadable:  # its encryption key is gone
        return None
    if known["hash"] != request_hash.hex():
        raise ValidationFailed(
            "Idempotency-Key: this key was used with another body.", resolution="Use a new key for a new request."
        )
    if row.locked_until is not None and row.locked_until > instant:
        raise KeyInUse("Idempotency-Key: a request with this key is in progress.")
    return answer


def _purge(session: Session) -> None:
    """Removes a few old rows: more than one request adds."""
    old = (
        select(IdempotencyKey.id)
        .where(IdempotencyKey.expires_at <= func.clock_timestamp())
        .order_by(IdempotencyKey.expires_at)
        .limit(_PURGED_PER_CLAIM)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.id.in_(old)))


def keep(
    session: Session, box: SecretBox, claimed: Claim, answer: Mapping[str, Any], *, more_follows: bool = False
) -> None:
    """Keeps the answer, in the transaction that does the work.

    With `more_follows` the claim stays: this is the answer if no later one is kept before the lease expires.
    Raises KeyInUse if another request has claimed the row.
    """
    values: dict[str, Any] = {"answer": box.seal(answer, row_id=claimed.row_id, column="answer")}
    if not more_follows:
        values["locked_until"] = None
    if not _write(session, _of(claimed).values(**values)):
        raise KeyInUse("Idempotency-Key: this request took so long that another one with this key has replaced it.")


def keep_error(session: Session, box: SecretBox, claimed: Claim, answer: Mapping[str, Any]) -> None:
    """Keeps an error as the answer and ends the claim. An answer that was kept before stays."""
    sealed = box.seal(answer, row_id=claimed.row_id, column="answer")
    _write(session, _of(claimed).values(answer=func.coalesce(IdempotencyKey.answer, sealed), locked_until=None))


def release(session: Session, claimed: Claim) -> None:
    """Ends the claim. The next request with this key does the work, unless an answer was kept."""
    session.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.id == claimed.row_id,
            IdempotencyKey.attempt == claimed.attempt,
            IdempotencyKey.answer.is_(None),
        )
    )
    _write(session, _of(claimed).values(locked_until=None))


def _of(claimed: Claim) -> Update:
    return update(IdempotencyKey).where(IdempotencyKey.id == claimed.row_id, IdempotencyKey.attempt == claimed.attempt)


def _write(session: Session, statement: Update) -> bool:
    return cast("CursorResult[Any]", session.execute(statement)).rowcount == 1
