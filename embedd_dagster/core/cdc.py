"""What becomes of a change to a followed table, by what the vector table is at that moment.

The rule behind all of it: a change to a table that has vectors is applied, or its key is noted until it can be, or a sync
is owed that will find it. A task that reads the source while the follower writes could bring back what it read before:
so what is changed under a task is applied (again) when the task has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from embedd_dagster.core.status import TaskType


@dataclass(frozen=True, slots=True)
class TableState:
    """A vector table as the follower sees it before and after it applies changes."""

    live_version: int | None
    paused: bool
    sync_owed: bool
    """A sync will compare it with the source, beginning later than now or at work already."""
    latest_task: str | None
    live_task: TaskType | None
    """The kind of the latest task while that is queued or running."""


class Treatment(StrEnum):
    """What becomes of changed keys."""

    APPLY = "apply"
    NOTE = "note"
    APPLY_AND_NOTE = "apply_and_note"
    """Into the live set now, and once more when the build that is under way has replaced it."""
    OWE = "owe"
    """A sync has to be asked for."""
    IGNORE = "ignore"
    """Nothing has to be done, or a sync that is owed will."""


def treatment(state: TableState | None) -> Treatment:
    """What becomes of keys that changed while the vector table is like this; None stands for one that is gone."""
    if state is None:
        return Treatment.IGNORE
    if state.live_task is not None:
        builds_beside = state.live_task is not TaskType.SYNC and state.live_version is not None
        return Treatment.APPLY_AND_NOTE if builds_beside and not state.sync_owed else Treatment.NOTE
    if state.live_version is None or state.sync_owed:
        return Treatment.IGNORE
    return Treatment.OWE if state.paused else Treatment.APPLY


def may_have_missed(before: TableState | None, after: TableState | None) -> bool:
    """Whether a task may have been at work between the two, so that what was done in between has to be done again."""
    if after is None:
        return False
    if before is None:
        return True
    return (
        after.live_task is not None
        or after.latest_task != before.latest_task
        or after.live_version != before.live_version
    )
