"""Requests that may be sent twice and take effect once: an `Idempotency-Key`, who is at work on it, what was answered.

A row is claimed, in a transaction of its own, before the work begins. The answer is kept in the transaction that does the
work, so both are there or neither is, wherever a process dies. A claim is a lease: once it is over, another attempt may
take the row, and the one before can keep no answer any more, which rolls its work back. So there is never a second
effect, whatever a lease's length. All times are the database's.

What was asked is kept as a hash, sealed as the answer is: a body may hold a password short enough to be guessed from one.
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
_PURGED_A_CLAIM: Final = 20
_TRIES: Final = 3


class KeyInUse(Conflict):
    """Another request with this key is under way."""

    default_code = "idempotency_key_in_use"
    default_resolution = "Send the request again a little later: it gets the first one's answer."
    retry_after_seconds = 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to do the work and to say what was answered, while the lease lasts and nobody has taken it over."""

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

    Raises KeyInUse while another attempt is under way, ValidationFailed where the key came with another request.
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
        if row is None:  # given up just now
            continue
        answer = _answer_of(session, box, row, request_hash)
        if answer is not None:
            return answer
        session.execute(update(IdempotencyKey).where(IdempotencyKey.id == claimed.row_id).values(**fresh))
        break
    else:
        raise KeyInUse("Idempotency-Key: other requests with this key are under way.")
    _purge(session)
    return claimed


def _answer_of(session: Session, box: SecretBox, row: IdempotencyKey, request_hash: bytes) -> dict[str, Any] | None:
    """What was answered; None where the row may be claimed: it is too old, its lease is over, or nothing opens it."""
    instant = database_now(session)
    if row.expires_at <= instant:
        return None
    try:
        known = box.open(row.request, row_id=row.id, column="request")
        answer = None if row.answer is None else box.open(row.answer, row_id=row.id, column="answer")
    except SecretUnreadable:  # its encryption key is gone, and with it what was remembered
        return None
    if known["hash"] != request_hash.hex():
        raise ValidationFailed(
            "Idempotency-Key: this key was used with another body.", resolution="Use a new key for a new request."
        )
    if row.locked_until is not None and row.locked_until > instant:
        raise KeyInUse("Idempotency-Key: a request with this key is under way.")
    return answer


def _purge(session: Session) -> None:
    """Removes a few rows that are too old: more than one request adds."""
    old = (
        select(IdempotencyKey.id)
        .where(IdempotencyKey.expires_at <= func.clock_timestamp())
        .order_by(IdempotencyKey.expires_at)
        .limit(_PURGED_A_CLAIM)
        .with_for_update(skip_locked=True)
    )
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.id.in_(old)))


def keep(
    session: Session, box: SecretBox, claimed: Claim, answer: Mapping[str, Any], *, more_follows: bool = False
) -> None:
    """Keeps the answer, in the transaction that does the work.

    With `more_follows` the claim goes on, and this is what is answered if nothing better is kept before it is over.
    Raises KeyInUse where another attempt has taken over.
    """
    values: dict[str, Any] = {"answer": box.seal(answer, row_id=claimed.row_id, column="answer")}
    if not more_follows:
        values["locked_until"] = None
    if not _write(session, _of(claimed).values(**values)):
        raise KeyInUse("Idempotency-Key: this request took so long that another one with this key has taken over.")


def keep_refusal(session: Session, box: SecretBox, claimed: Claim, answer: Mapping[str, Any]) -> None:
    """Keeps why nothing was done, and ends the claim; an answer that was kept before stays."""
    sealed = box.seal(answer, row_id=claimed.row_id, column="answer")
    _write(session, _of(claimed).values(answer=func.coalesce(IdempotencyKey.answer, sealed), locked_until=None))


def give_up(session: Session, claimed: Claim) -> None:
    """Ends the claim: the next request with this key does the work, unless an answer has been kept."""
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
