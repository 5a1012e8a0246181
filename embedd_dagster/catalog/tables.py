"""The catalog's tables, as SQLAlchemy maps them. What they mean is said here; how they are changed, in the repositories."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Index, LargeBinary, MetaData, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from embedd_dagster.core.vector_table import Column, VectorConfiguration

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """What every table shares: names of constraints, and the database types of Python's."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it
        str: Text(),
        int: BigInteger(),
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB(),
        list[dict[str, Any]]: JSONB(),
        bytes: LargeBinary(),
    }


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


class VectorTable(Base):
    """What should be: the configuration as last edited. What is live stands in `vector_sets`."""

    __tablename__ = "vector_tables"
    __table_args__ = (
        Index(
            "uq_vector_tables_environment_id_name",
            "environment_id",
            "name",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(None, "environment_id", "created_at", "id"),
        # lists by one of these
        *(
            Index(
                f"ix_vector_tables_by_{column}",
                "environment_id",
                column,
                "created_at",
                "id",
                postgresql_where=text("deleted_at IS NULL"),
            )
            for column in ("sync_status", "connection_id", "source_table")
        ),
        # the reconcile sensor reads only what is not settled
        Index(
            "ix_vector_tables_unsettled",
            "sync_status",
            postgresql_where=text("sync_status NOT IN ('synced', 'paused', 'pending', 'error')"),
        ),
        Index("ix_vector_tables_next_sync_at", "next_sync_at", postgresql_where=text("next_sync_at IS NOT NULL")),
        Index(
            "ix_vector_tables_unscheduled",
            "id",
            postgresql_where=text("next_sync_at IS NULL AND live_version IS NOT NULL AND deleted_at IS NULL"),
        ),
        Index("ix_vector_tables_resync", "id", postgresql_where=text("resync_wanted > resync_done")),
        Index(
            "ix_vector_tables_followed",
            "connection_id",
            postgresql_where=text("sync_mode = 'cdc' AND deleted_at IS NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id"))
    connection_id: Mapped[str] = mapped_column(ForeignKey("connections.id"), index=True)
    embedding_provider_id: Mapped[str | None] = mapped_column(ForeignKey("embedding_providers.id"), index=True)
    name: Mapped[str]
    source_table: Mapped[str]
    primary_key_column: Mapped[str]
    columns: Mapped[list[dict[str, Any]]]
    embedding_model: Mapped[str]
    embedding_dimensions: Mapped[int]
    mode: Mapped[str]
    sync_mode: Mapped[str]
    sync_schedule: Mapped[str | None]
    sync_interval_seconds: Mapped[int | None]
    config_version: Mapped[int] = mapped_column(default=1)
    """Grows with every change that the vectors must follow; compared with the live set's."""
    held_config_version: Mapped[int | None]
    """The configuration whose build somebody cancelled: while it is the present one, nothing begins it by itself."""
    storage_name: Mapped[str] = mapped_column(unique=True)
    """`vt_<8>_<name>`: the Qdrant alias, and behind `embedd_` the platform table."""
    partition_key: Mapped[str] = mapped_column(unique=True)
    """Its partition in Dagster: the storage name, never cut for PostgreSQL. Renaming the vector table does not change it."""
    platform_vector_ref: Mapped[str | None]
    sync_status: Mapped[str]
    paused: Mapped[bool] = mapped_column(default=False)
    live_version: Mapped[int | None]
    """The version of the vector set that queries go to; changing it is the swap."""
    total_rows: Mapped[int] = mapped_column(default=0)
    synced_rows: Mapped[int] = mapped_column(default=0)
    last_sync_at: Mapped[datetime | None]
    next_sync_at: Mapped[datetime | None]
    syncs_since_full: Mapped[int] = mapped_column(default=0, server_default="0")
    resync_wanted: Mapped[int] = mapped_column(default=0, server_default="0")
    """How often a comparison with the source was asked for, because changes may have been missed; see `resyncs.py`."""
    resync_done: Mapped[int] = mapped_column(default=0, server_default="0")
    """Up to which of those it has been made: smaller than `resync_wanted`, one is owed."""
    resync_reason: Mapped[str | None]
    resync_options: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    """The options of the sync that is owed."""
    resync_held_by: Mapped[str | None]
    """The follower's run that still has the keys it owes in memory: no sync is needed while it lives."""
    resync_not_before: Mapped[datetime | None]
    followed_since: Mapped[datetime | None]
    """Since when its changes are followed without a gap; None while they are not."""
    followed_shape: Mapped[dict[str, Any] | None]
    """What the source table was like when it was last known to be followed without a gap, in the feed's own terms."""
    changes_pending: Mapped[int] = mapped_column(default=0, server_default="0")
    """Changes that were read and are not yet applied."""
    last_error: Mapped[str | None]
    last_error_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    @property
    def is_held(self) -> bool:
        """Whether the build of the present configuration was cancelled, and waits to be asked for."""
        return self.held_config_version == self.config_version

    @property
    def configuration(self) -> VectorConfiguration:
        """The configuration as last edited."""
        return VectorConfiguration(
            source_table=self.source_table,
            primary_key_column=self.primary_key_column,
            columns=tuple(Column.from_json(column) for column in self.columns),
            embedding_model=self.embedding_model,
            embedding_dimensions=self.embedding_dimensions,
            embedding_provider_id=self.embedding_provider_id,
        )


class ChangeFeed(Base):
    """The position in one connection's log from which its cdc tables are followed, and the run that follows it."""

    __tablename__ = "change_feeds"

    connection_id: Mapped[str] = mapped_column(ForeignKey("connections.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str]
    """What it made in the source is named by this: a slot and a publication in PostgreSQL."""
    position: Mapped[int | None]
    """Never behind what the source was told that it may forget."""
    lag_bytes: Mapped[int | None]
    caught_up_at: Mapped[datetime | None]
    """When a read began that found nothing which has not been applied since."""
    dagster_run_id: Mapped[str | None]
    """The run that owns it: nobody else may confirm a position."""
    claimed_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(default=0)
    """Runs that ended badly, one after the other."""
    next_start_at: Mapped[datetime | None]
    last_error: Mapped[str | None]
    last_error_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class VectorSetRow(Base):
    """One built version of a vector table, with the configuration it was built from."""

    __tablename__ = "vector_sets"

    vector_table_id: Mapped[str] = mapped_column(ForeignKey("vector_tables.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]
    config_version: Mapped[int]
    configuration: Mapped[dict[str, Any]]
    key_type: Mapped[str | None]
    source_origin: Mapped[dict[str, Any] | None]
    """Which table of the source it was read from (`TableReader.origin`); None where that was never recorded."""
    digest_bits: Mapped[int | None]
    digest: Mapped[bytes | None]
    """The source's bucket digests (int64, little-endian) as of the last completed sync, or as of the build's begin."""
    row_count: Mapped[int | None]
    skipped_count: Mapped[int | None]
    """Source rows without any text, as of the last completed run: they have no point."""
    truncated_count: Mapped[int | None]
    """Texts that were cut at the model's limit since the build began; one that changes often is counted each time."""
    created_at: Mapped[datetime]
    live_at: Mapped[datetime | None]
    retired_at: Mapped[datetime | None]


class Shard(Base):
    """A key range of a build, and how far it has been written: the durable checkpoint."""

    __tablename__ = "shards"

    vector_table_id: Mapped[str] = mapped_column(ForeignKey("vector_tables.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    lower_key: Mapped[str | None]
    upper_key: Mapped[str | None]
    last_key: Mapped[str | None]
    """Every row up to this key (encoded) is in the store, or among the failed rows."""
    done: Mapped[bool] = mapped_column(default=False)
    counts: Mapped[dict[str, Any]]


class Task(Base):
    """Something that is to be done to a vector table: the outbox of run launches, and their record."""

    __tablename__ = "tasks"
    __table_args__ = (
        # at most one live task a vector table: this is the 409
        Index(
            "uq_tasks_live_target_id",
            "target_id",
            unique=True,
            postgresql_where=text("status IN ('pending', 'running')"),
        ),
        Index("ix_tasks_live", "status", postgresql_where=text("status IN ('pending', 'running')")),
        Index(None, "environment_id", "created_at", "id"),
        Index(None, "target_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    environment_id: Mapped[str] = mapped_column(ForeignKey("environments.id"))
    target_id: Mapped[str]
    task_type: Mapped[str]
    status: Mapped[str]
    progress: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]]
    resync: Mapped[int] = mapped_column(default=0, server_default="0")
    """The vector table's `resync_wanted` when it was claimed: what it settles when it completes."""
    config_version: Mapped[int | None]
    """The vector table's when it was claimed: what it builds. None while it waits."""
    attempts: Mapped[int] = mapped_column(default=0)
    handed_back: Mapped[int] = mapped_column(default=0, server_default="0")
    """How often a run claimed it and gave it back through no fault of the task: these claims are not attempts."""
    max_attempts: Mapped[int]
    last_error: Mapped[str | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    dagster_run_id: Mapped[str | None]
    """The run that owns the task: nobody else may write for it."""
    launched_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class RunHeartbeat(Base):
    """When a Dagster run last said that its process is alive, whether or not it owned a task at that moment."""

    __tablename__ = "run_heartbeats"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    heartbeat_at: Mapped[datetime]


class FailedRow(Base):
    """A row that could not be embedded or written; never its content."""

    __tablename__ = "failed_rows"

    vector_table_id: Mapped[str] = mapped_column(ForeignKey("vector_tables.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    row_hash: Mapped[int] = mapped_column()
    bucket: Mapped[int] = mapped_column(server_default="0")
    step: Mapped[str]
    code: Mapped[str]
    message: Mapped[str]
    attempts: Mapped[int] = mapped_column(default=1)
    first_failed_at: Mapped[datetime]
    last_failed_at: Mapped[datetime]
