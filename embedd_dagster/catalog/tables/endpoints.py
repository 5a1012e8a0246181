"""Tables of what embedd connects to: source databases with their CDC streams, and embedding providers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Double, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from embedd_dagster.catalog.tables.base import Base


class Connection(Base):
    """Somebody's database. What is not secret stands in `settings`, the rest is encrypted."""

    __tablename__ = "connections"
    __table_args__ = (
        UniqueConstraint("environment_id", "name"),
        Index(None, "environment_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id"))
    name: Mapped[str]
    provider: Mapped[str]
    mode: Mapped[str]
    status: Mapped[str]
    """`pending`, `connected` or `failed`: the outcome of the last test."""
    settings: Mapped[dict[str, Any]]
    credentials: Mapped[bytes]
    last_error: Mapped[str | None]
    tested_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class CdcStreamRow(Base):
    """The position in one connection's log, and the run that reads it: the CDC consumer."""

    __tablename__ = "change_feeds"

    connection_id: Mapped[str] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str]
    """The name of what it created in the source, such as a replication slot."""
    position: Mapped[str | None]
    """Text that only the connector reads. Never behind the confirmed position."""
    lag_bytes: Mapped[int | None]
    caught_up_at: Mapped[datetime | None]
    """When the last read began of which all changes are applied."""
    dagster_run_id: Mapped[str | None]
    """The run that owns it: only it may confirm a position."""
    claimed_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(default=0)
    """Runs that ended with an error, one after the other."""
    next_start_at: Mapped[datetime | None]
    last_error: Mapped[str | None]
    last_error_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class EmbeddingProvider(Base):
    """An account at an embedding provider, or a server that speaks a provider's protocol."""

    __tablename__ = "embedding_providers"
    __table_args__ = (
        UniqueConstraint("environment_id", "name"),
        Index(None, "environment_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id"))
    name: Mapped[str]
    provider: Mapped[str]
    base_url: Mapped[str | None]
    credentials: Mapped[bytes]
    limits: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(default="pending", server_default="pending")
    """`pending`, `connected` or `failed`: the outcome of the last test."""
    last_error: Mapped[str | None]
    tested_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class ProviderBudget(Base):
    """What all processes together have booked of a provider's limit a minute, see `provider_budgets.py`."""

    __tablename__ = "provider_budgets"

    embedding_provider_id: Mapped[str] = mapped_column(
        ForeignKey("embedding_providers.id", ondelete="CASCADE"), primary_key=True
    )
    kind: Mapped[str] = mapped_column(primary_key=True)
    """`requests` or `tokens`."""
    level: Mapped[float] = mapped_column(Double())
    """What was booked and not yet paid off at `updated_at`; it drains at the limit."""
    updated_at: Mapped[datetime]
    """By the database's clock."""
