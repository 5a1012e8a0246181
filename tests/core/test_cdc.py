"""Every change to a table that has vectors is applied, buffered or found by a resync; none is ever lost."""

from itertools import product

import pytest

from embedd_dagster.core.cdc import ChangeAction, TableState, decide_action, may_have_missed
from embedd_dagster.core.status import TaskType

STATES = [
    TableState(live_version=version, paused=paused, resync_pending=pending, latest_task=task and "t", live_task=task)
    for version, paused, pending, task in product((None, 1), (False, True), (False, True), (None, *TaskType))
]


@pytest.mark.parametrize("state", STATES)
def test_a_change_is_never_lost(state: TableState) -> None:
    chosen = decide_action(state)
    if chosen is ChangeAction.IGNORE:
        assert state.live_task is None
        assert state.live_version is None or state.resync_pending
    if state.live_task is not None:
        assert chosen in (ChangeAction.BUFFER, ChangeAction.APPLY_AND_BUFFER)


def test_changes_during_a_rebuild_are_applied_to_the_live_set_and_buffered() -> None:
    building = TableState(1, paused=False, resync_pending=False, latest_task="t", live_task=TaskType.REBACKFILL)
    assert decide_action(building) is ChangeAction.APPLY_AND_BUFFER


def test_changes_during_a_sync_are_buffered() -> None:
    syncing = TableState(1, paused=False, resync_pending=False, latest_task="t", live_task=TaskType.SYNC)
    assert decide_action(syncing) is ChangeAction.BUFFER


def test_changes_of_a_paused_table_need_a_resync_and_of_a_deleted_table_nothing() -> None:
    assert decide_action(TableState(1, True, False, None, None)) is ChangeAction.RESYNC
    assert decide_action(None) is ChangeAction.IGNORE


def test_a_task_that_ran_in_between_is_noticed() -> None:
    before = TableState(1, False, False, "t1", None)
    assert not may_have_missed(before, before)
    assert may_have_missed(before, TableState(1, False, False, "t2", None))
    assert may_have_missed(before, TableState(2, False, False, "t1", None))
    assert may_have_missed(before, TableState(1, False, False, "t1", TaskType.SYNC))
    assert may_have_missed(None, before)
    assert not may_have_missed(before, None)
