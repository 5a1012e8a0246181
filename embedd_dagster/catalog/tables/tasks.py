"""Tables of what is being done: tasks, and the heartbeats of Dagster runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from embedd_dagster.catalog.tables.base import Base


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
    """The vector table's `resync_requested_seq` when it was claimed: what it settles when it completes."""
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
