"""The states of a vector table, of a vector set and of a task, and the moves allowed between them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class SyncStatus(StrEnum):
    """The state of a vector table, as callers see it (SPEC §3). `deleting` is never shown: it is a 404."""

    PENDING = "pending"
    BACKFILLING = "backfilling"
    SYNCED = "synced"
    PENDING_REBACKFILL = "pending_rebackfill"
    PAUSED = "paused"
    ERROR = "error"
    DELETING = "deleting"


SYNC_STATUS_MOVES: Final[dict[SyncStatus, frozenset[SyncStatus]]] = {
    SyncStatus.PENDING: frozenset({SyncStatus.BACKFILLING, SyncStatus.PAUSED, SyncStatus.ERROR, SyncStatus.DELETING}),
    SyncStatus.BACKFILLING: frozenset(
        {
            SyncStatus.SYNCED,
            SyncStatus.ERROR,
            SyncStatus.PENDING,  # a first backfill was cancelled
            SyncStatus.PENDING_REBACKFILL,  # the configuration changed while it ran
            SyncStatus.PAUSED,
            SyncStatus.DELETING,
        }
    ),
    SyncStatus.SYNCED: frozenset(
        {
            SyncStatus.BACKFILLING,
            SyncStatus.PENDING_REBACKFILL,
            SyncStatus.PAUSED,
            SyncStatus.ERROR,
            SyncStatus.DELETING,
        }
    ),
    SyncStatus.PENDING_REBACKFILL: frozenset(
        {SyncStatus.BACKFILLING, SyncStatus.SYNCED, SyncStatus.PAUSED, SyncStatus.ERROR, SyncStatus.DELETING}
    ),
    SyncStatus.PAUSED: frozenset(
        {
            SyncStatus.PENDING,
            SyncStatus.BACKFILLING,
            SyncStatus.SYNCED,
            SyncStatus.PENDING_REBACKFILL,
            SyncStatus.ERROR,
            SyncStatus.DELETING,
        }
    ),
    SyncStatus.ERROR: frozenset(
        {
            SyncStatus.BACKFILLING,
            SyncStatus.SYNCED,
            SyncStatus.PENDING_REBACKFILL,
            SyncStatus.PAUSED,
            SyncStatus.DELETING,
        }
    ),
    SyncStatus.DELETING: frozenset(),
}


class TaskType(StrEnum):
    """What a task does."""

    BACKFILL = "backfill"
    REBACKFILL = "rebackfill"
    SYNC = "sync"


class TaskStatus(StrEnum):
    """The state of a task; `pending` and `running` are live, at most one live task a vector table."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


LIVE_TASK_STATUSES: Final = (TaskStatus.PENDING, TaskStatus.RUNNING)

TASK_STATUS_MOVES: Final[dict[TaskStatus, frozenset[TaskStatus]]] = {
    TaskStatus.PENDING: frozenset({TaskStatus.RUNNING, TaskStatus.FAILED, TaskStatus.CANCELLED}),
    # back to pending: its run died and it is requeued
    TaskStatus.RUNNING: frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.PENDING}),
    TaskStatus.COMPLETED: frozenset(),
    TaskStatus.FAILED: frozenset(),
    TaskStatus.CANCELLED: frozenset(),
}


class VectorSetState(StrEnum):
    """The state of one built version of a vector table."""

    BUILDING = "building"
    LIVE = "live"
    RETIRED = "retired"
    """Replaced; dropped from the store after a grace period for queries under way."""
