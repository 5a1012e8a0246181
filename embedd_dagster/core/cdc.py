"""What is done with a change to a CDC table, by the state of the vector table at that moment.

A change to a table that has vectors is applied, or its key is buffered until it can be, or a resync is requested that will
find it. A task that reads the source while a consumer writes could write back what it read before, so a change that happens
during a task is applied (again) when the task has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from embedd_dagster.core.status import TaskType


@dataclass(frozen=True, slots=True)
class TableState:
    """A vector table as a CDC consumer sees it before and after it applies changes."""

    live_version: int | None
    paused: bool
    resync_pending: bool
    """A sync will compare it with the source: it begins later than now, or is running already."""
    latest_task: str | None
    live_task: TaskType | None
    """The type of the latest task while that is queued or running."""


class ChangeAction(StrEnum):
    """What is done with changed keys."""

    APPLY = "apply"
    BUFFER = "buffer"
    APPLY_AND_BUFFER = "apply_and_buffer"
    """Applied to the live set now, and once more when the running build has replaced it."""
    RESYNC = "resync"
    """A resync is requested."""
    IGNORE = "ignore"
    """Nothing: there are no vectors yet, or a pending resync finds the change."""


def decide_action(state: TableState | None) -> ChangeAction:
    """What is done with keys that change while the vector table is in this state; None means that it is gone."""
    if state is None:
        return ChangeAction.IGNORE
    if state.live_task is not None:
        is_rebuild = state.live_task is not TaskType.SYNC and state.live_version is not None
        return ChangeAction.APPLY_AND_BUFFER if is_rebuild and not state.resync_pending else ChangeAction.BUFFER
    if state.live_version is None or state.resync_pending:
        return ChangeAction.IGNORE
    return ChangeAction.RESYNC if state.paused else ChangeAction.APPLY


def may_have_missed(before: TableState | None, after: TableState | None) -> bool:
    """Whether a task may have run between the two, so that what was applied in between must be applied again."""
    if after is None:
        return False
    if before is None:
        return True
    return (
        after.live_task is not None
        or after.latest_task != before.latest_task
        or after.live_version != before.live_version
    )
