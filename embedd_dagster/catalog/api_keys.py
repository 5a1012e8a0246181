"""API keys: made, shown once, found by their hash, revoked."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.tables import ApiKey
from embedd_dagster.errors import NotFound, Unauthorized

PREFIX_LENGTH = 12


class Permission(StrEnum):
    """What a key may do: everything, or GETs and queries."""

    FULL = "full"
    READ_ONLY = "read_only"


class NewKey(NamedTuple):
    """A key at the only moment when it is known in clear."""

    raw: str
    api_key: ApiKey


def create(
    session: Session,
    org_id: str,
    environment_id: str | None,
    name: str,
    permission: Permission,
    *,
    made_by: ApiKey | None = None,
) -> NewKey:
    """A new key: `sk_` and 32 random bytes. One that another key has made counts against that one's rate limit."""
    raw = "sk_" + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    key = ApiKey(
        id=new_id("key"),
        org_id=org_id,
        environment_id=environment_id,
        name=name,
        permission=permission.value,
        prefix=raw[:PREFIX_LENGTH],
        key_hash=hash_key(raw),
        rate_limit_key_id=made_by.counted_as if made_by is not None else None,
        created_at=now(),
        revoked_at=None,
    )
    session.add(key)
    session.flush()
    return NewKey(raw, key)


def authenticate(session: Session, raw: str) -> ApiKey:
    """The key that this text is. Raises Unauthorized: alike for every unknown key, apart only for a revoked one."""
    wanted = hash_key(raw)
    key = session.scalar(select(ApiKey).where(ApiKey.key_hash == wanted))
    if key is None:
        raise unknown_key()
    check(wanted, key.key_hash, key.revoked_at)
    return key


def hash_key(raw: str) -> bytes:
    """What a key is found by."""
    return hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()


def check(wanted: bytes, found: bytes, revoked_at: datetime | None) -> None:
    """Raises Unauthorized unless the key that was found is the wanted one, by its hash, and was not revoked."""
    if not hmac.compare_digest(found, wanted):
        raise unknown_key()
    if revoked_at is not None:
        raise Unauthorized(
            "The API key was revoked.", code="key_revoked", resolution="Make a new one with `embedd keys create`."
        )


def unknown_key() -> Unauthorized:
    """The error for every key that is not known, however it came about."""
    return Unauthorized("The API key is not known.")


def page(
    session: Session,
    org_id: str,
    environment_id: str | None,
    limit: int,
    after: Position | None,
    *,
    name: str | None = None,
) -> Page[ApiKey]:
    """The organization's keys (of this name), newest first; with an environment, only those of it alone."""
    statement = having(select(ApiKey).where(ApiKey.org_id == org_id), {ApiKey.name: name})
    if environment_id is not None:
        statement = statement.where(ApiKey.environment_id == environment_id)
    return fetch_page(session, statement, ApiKey, limit, after)


def revoke(session: Session, org_id: str, environment_id: str | None, key_id: str) -> None:
    """Revokes a key, at once and for ever. Idempotent. Raises NotFound."""
    key = session.get(ApiKey, key_id)
    if key is None or key.org_id != org_id or (environment_id is not None and key.environment_id != environment_id):
        raise NotFound("api_key", key_id)
    key.revoked_at = key.revoked_at or now()
