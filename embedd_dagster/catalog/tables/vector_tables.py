"""Tables of what should exist and what is built: vector tables, their CDC state, their versions, shards and failed rows."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from embedd_dagster.catalog.tables.base import Base
from embedd_dagster.core.vector_table import Column, VectorConfiguration


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
    not_rebuilt_version: Mapped[int | None] = mapped_column("held_config_version")
    """The configuration version whose build was cancelled: while it is the present one, only a request starts the build."""
    storage_name: Mapped[str] = mapped_column(unique=True)
    """`vt_<8>_<name>`: the name in the store; a platform store may put `embedd_` before it."""
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
    has_failed: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """The last error stopped it: unless it is paused or being built, its status is `error`."""
    last_error: Mapped[str | None]
    last_error_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    # an inner join: a row of each is made and deleted together with the other
    cdc: Mapped[CdcState] = relationship(
        lazy="joined", innerjoin=True, cascade="all, delete-orphan", passive_deletes=True
    )

    @property
    def is_rebuild_suppressed(self) -> bool:
        """Whether the build of the present configuration was cancelled: only a request starts it again."""
        return self.not_rebuilt_version == self.config_version

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


class CdcState(Base):
    """What CDC knows of one vector table, and the resync that is requested for it; see `resyncs.py`."""

    __tablename__ = "cdc_states"
    __table_args__ = (
        Index(
            "ix_cdc_states_resync",
            "vector_table_id",
            postgresql_where=text("resync_requested_seq > resync_completed_seq"),
        ),
    )

    vector_table_id: Mapped[str] = mapped_column(ForeignKey("vector_tables.id", ondelete="CASCADE"), primary_key=True)
    subscribed_since: Mapped[datetime | None]
    """Since when its changes are read without a gap; None while they are not."""
    table_fingerprint: Mapped[dict[str, Any] | None]
    """What the source table looked like when it was last known to be read without a gap, in the connector's terms."""
    changes_pending: Mapped[int] = mapped_column(default=0, server_default="0")
    """Changes that were read and are not yet applied."""
    buffered_by_run_id: Mapped[str | None]
    """The CDC consumer that has the changed keys of the resync in memory: while it lives, no sync is needed."""
    resync_requested_seq: Mapped[int] = mapped_column(default=0, server_default="0")
    """How often a resync was requested, because changes may have been missed."""
    resync_completed_seq: Mapped[int] = mapped_column(default=0, server_default="0")
    """The last request that is completed: if it is smaller than `resync_requested_seq`, a resync is pending."""
    resync_reason: Mapped[str | None]
    resync_options: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    """The options of the sync that is pending."""
    resync_not_before: Mapped[datetime | None]


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


class FailedRow(Base):
    """A row that could not be embedded or written; never its content."""

    __tablename__ = "failed_rows"

    vector_table_id: Mapped[str] = mapped_column(ForeignKey("vector_tables.id", ondelete="CASCADE"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    key_hash: Mapped[bytes] = mapped_column(primary_key=True)
    """SHA-256 of the key: PostgreSQL indexes no value longer than 2.7 KB."""
    key: Mapped[str]
    row_hash: Mapped[int] = mapped_column()
    bucket: Mapped[int] = mapped_column(server_default="0")
    step: Mapped[str]
    code: Mapped[str]
    message: Mapped[str]
    attempts: Mapped[int] = mapped_column(default=1)
    first_failed_at: Mapped[datetime]
    last_failed_at: Mapped[datetime]
