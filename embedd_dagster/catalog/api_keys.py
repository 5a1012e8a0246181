"""API keys: creating, listing and revoking them. The catalog stores only their hashes."""

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


class AuthenticatedKey(NamedTuple):
    """A valid API key that a request came with."""

    id: str
    org_id: str
    environment_id: str | None
    """The only environment in which the key is valid; None: all environments of its organization."""
    permission: str
    prefix: str
    rate_limit_key_id: str
    """The id of the key whose rate limit the requests count against."""


class NewKey(NamedTuple):
    """A new key. `raw` is the key itself, which is not stored."""

    raw: str
    api_key: ApiKey


def create(
    session: Session,
    org_id: str,
    environment_id: str | None,
    name: str,
    permission: Permission,
    *,
    made_by: AuthenticatedKey | None = None,
) -> NewKey:
    """A new key: `sk_` and 32 random bytes. Its requests count against the rate limit of the key that made it."""
    raw = "sk_" + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    key = ApiKey(
        id=new_id("key"),
        org_id=org_id,
        environment_id=environment_id,
        name=name,
        permission=permission.value,
        prefix=raw[:PREFIX_LENGTH],
        key_hash=hash_key(raw),
        rate_limit_key_id=made_by.rate_limit_key_id if made_by is not None else None,
        created_at=now(),
        revoked_at=None,
    )
    session.add(key)
    session.flush()
    return NewKey(raw, key)


def hash_key(raw: str) -> bytes:
    """The hash that a key is stored under."""
    return hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()


def check(wanted: bytes, found: bytes, revoked_at: datetime | None) -> None:
    """Raises Unauthorized if the hashes differ or the key was revoked."""
    if not hmac.compare_digest(found, wanted):
        raise unknown_key()
    if revoked_at is not None:
        raise Unauthorized(
            "The API key was revoked.", code="key_revoked", resolution="Make a new one with `embedd keys create`."
        )


def unknown_key() -> Unauthorized:
    """The error for every unknown key: always the same, so that it reveals nothing."""
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
