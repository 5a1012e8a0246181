"""Rows that could not be embedded or stored, by the built version that lacks them; never their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ARRAY, LargeBinary, any_, bindparam, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.pages import Page, Position
from embedd_dagster.catalog.tables import FailedRow
from embedd_dagster.core.keys import Key, decode_key, encode_key
from embedd_dagster.core.rows import Fingerprint, VectorSet


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no vector; never its content."""

    key: Key
    row_hash: int
    bucket: int
    step: str
    code: str
    message: str


def record(session: Session, vector_set: VectorSet, failures: Sequence[RowFailure]) -> None:
    """Keeps the failures and counts the attempts. Idempotent except for that count."""
    if not failures:
        return
    instant = now()
    statement = insert(FailedRow).values(
        [
            {
                "vector_table_id": vector_set.vector_table_id,
                "version": vector_set.version,
                "key_hash": _key_hash(failure.key),
                "key": encode_key(failure.key),
                "row_hash": failure.row_hash,
                "bucket": failure.bucket,
                "step": failure.step,
                "code": failure.code,
                "message": failure.message,
                "attempts": 1,
                "first_failed_at": instant,
                "last_failed_at": instant,
            }
            for failure in failures
        ]
    )
    changed: dict[str, Any] = {
        name: statement.excluded[name] for name in ("row_hash", "bucket", "step", "code", "message", "last_failed_at")
    }
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["vector_table_id", "version", "key_hash"],
            set_={**changed, "attempts": FailedRow.attempts + 1},
        )
    )


def _key_hash(key: Key) -> bytes:
    return hashlib.sha256(encode_key(key).encode()).digest()


def fingerprints(session: Session, vector_set: VectorSet) -> list[Fingerprint]:
    """The failed rows as they were when they failed, by key."""
    statement = select(FailedRow.key, FailedRow.row_hash, FailedRow.bucket).where(
        FailedRow.vector_table_id == vector_set.vector_table_id, FailedRow.version == vector_set.version
    )
    rows = session.execute(statement.order_by(FailedRow.key))
    return [Fingerprint(decode_key(key), row_hash, bucket) for key, row_hash, bucket in rows]


def count(session: Session, vector_table_id: str, version: int) -> int:
    """How many rows of a version have failed."""
    statement = select(func.count()).select_from(FailedRow)
    statement = statement.where(FailedRow.vector_table_id == vector_table_id, FailedRow.version == version)
    return session.scalar(statement) or 0


def page(session: Session, vector_table_id: str, limit: int, after: Position | None) -> Page[FailedRow]:
    """Failed rows of the newest version that has any, the latest to fail first."""
    newest = select(func.max(FailedRow.version)).where(FailedRow.vector_table_id == vector_table_id).scalar_subquery()
    statement = select(FailedRow).where(FailedRow.vector_table_id == vector_table_id, FailedRow.version == newest)
    order = (FailedRow.first_failed_at, func.encode(FailedRow.key_hash, "hex"))
    if after is not None:
        statement = statement.where(tuple_(*order) < tuple_(after.created_at, after.object_id))
    rows = list(session.scalars(statement.order_by(*(column.desc() for column in order)).limit(limit + 1)))
    last = rows[limit - 1] if len(rows) > limit else None
    return Page(rows[:limit], None if last is None else Position(last.first_failed_at, last.key_hash.hex()))


def clear(session: Session, vector_set: VectorSet, keys: Sequence[Key]) -> None:
    """Removes the failures of rows that are now written, without text, or deleted. Idempotent."""
    # one parameter for all keys: PostgreSQL takes at most 65,535
    hashes = bindparam("hashes", [_key_hash(key) for key in keys], type_=ARRAY(LargeBinary))
    session.execute(
        delete(FailedRow).where(
            FailedRow.vector_table_id == vector_set.vector_table_id,
            FailedRow.version == vector_set.version,
            FailedRow.key_hash == any_(hashes),
        )
    )
