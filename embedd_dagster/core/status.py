"""The states of a vector table, of a vector set and of a task."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class SyncStatus(StrEnum):
    """The state of a vector table, as callers see it. `deleting` is never shown: the API answers 404."""

    PENDING = "pending"
    BACKFILLING = "backfilling"
    SYNCED = "synced"
    PENDING_REBACKFILL = "pending_rebackfill"
    PAUSED = "paused"
    ERROR = "error"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class StatusFacts:
    """What the sync status of a vector table follows from."""

    is_deleted: bool
    is_building: bool
    """A backfill or re-backfill is pending or running."""
    is_paused: bool
    has_failed: bool
    """The last task failed for good, or something has to be done by a person first."""
    config_version: int
    """The configuration as last edited."""
    live_config_version: int | None
    """The configuration of the live version; None before the first backfill."""

    @property
    def is_outdated(self) -> bool:
        """Whether what is live was built from an earlier configuration."""
        return self.live_config_version is not None and self.live_config_version < self.config_version


def status_of(facts: StatusFacts) -> SyncStatus:
    """The sync status that callers see: the first of these facts that is true decides."""
    if facts.is_deleted:
        return SyncStatus.DELETING
    if facts.is_building:
        return SyncStatus.BACKFILLING
    if facts.is_paused:
        return SyncStatus.PAUSED
    if facts.has_failed:
        return SyncStatus.ERROR
    if facts.live_config_version is None:
        return SyncStatus.PENDING
    return SyncStatus.PENDING_REBACKFILL if facts.is_outdated else SyncStatus.SYNCED


class TaskType(StrEnum):
    """What a task does."""

    BACKFILL = "backfill"
    REBACKFILL = "rebackfill"
    SYNC = "sync"


class TaskStatus(StrEnum):
    """The state of a task; `pending` and `running` are live, a vector table has at most one live task."""

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
