"""Tables of who may do what: organizations, environments, API keys, and answers kept for repeated requests."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from embedd_dagster.catalog.tables.base import Base


class Organization(Base):
    """A tenant: nothing of one is ever seen by another."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]


class Environment(Base):
    """A scope within an organization; every request is made in one."""

    __tablename__ = "environments"
    __table_args__ = (UniqueConstraint("org_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str]
    created_at: Mapped[datetime]


class ApiKey(Base):
    """A key: only its SHA-256 is kept. Without an environment it is good for all of its organization."""

    __tablename__ = "api_keys"
    __table_args__ = (
        Index(None, "org_id", "created_at", "id"),
        Index("ix_api_keys_name", "org_id", "name", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    environment_id: Mapped[str | None] = mapped_column(ForeignKey("environments.id", ondelete="CASCADE"))
    name: Mapped[str]
    permission: Mapped[str]
    prefix: Mapped[str]
    """The first 12 characters, for display."""
    key_hash: Mapped[bytes] = mapped_column(unique=True)
    rate_limit_key_id: Mapped[str | None]
    """The key that made this one, or that one's own maker and so on: they have one rate limit together."""
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """A request that was made with an Idempotency-Key, and what was answered; see `idempotency.py`."""

    __tablename__ = "idempotency_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    """A hash of environment, method, path and key: the key is another one wherever one of these is."""
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id", ondelete="CASCADE"), index=True)
    attempt: Mapped[str]
    """Who may answer: nobody else may write here."""
    request: Mapped[bytes]
    """The hash of the body, sealed."""
    answer: Mapped[bytes | None]
    """Sealed: an answer may hold an API key in clear."""
    locked_until: Mapped[datetime | None]
    """The end of the attempt's lease, None once it has ended by itself."""
    expires_at: Mapped[datetime] = mapped_column(index=True)
