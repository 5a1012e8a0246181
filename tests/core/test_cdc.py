"""Every change to a table that has vectors is applied, noted or owed; none is ever ignored for nothing."""

from itertools import product

import pytest

from embedd_dagster.core.cdc import TableState, Treatment, may_have_missed, treatment
from embedd_dagster.core.status import TaskType

STATES = [
    TableState(live_version=version, paused=paused, sync_owed=owed, latest_task=task and "t", live_task=task)
    for version, paused, owed, task in product((None, 1), (False, True), (False, True), (None, *TaskType))
]


@pytest.mark.parametrize("state", STATES)
def test_a_change_is_never_lost(state: TableState) -> None:
    chosen = treatment(state)
    if chosen is Treatment.IGNORE:
        assert state.live_task is None
        assert state.live_version is None or state.sync_owed
    if state.live_task is not None:
        assert chosen in (Treatment.NOTE, Treatment.APPLY_AND_NOTE)


def test_what_is_live_follows_while_another_set_is_built() -> None:
    building = TableState(1, paused=False, sync_owed=False, latest_task="t", live_task=TaskType.REBACKFILL)
    assert treatment(building) is Treatment.APPLY_AND_NOTE


def test_nothing_is_written_under_a_sync() -> None:
    syncing = TableState(1, paused=False, sync_owed=False, latest_task="t", live_task=TaskType.SYNC)
    assert treatment(syncing) is Treatment.NOTE


def test_a_paused_table_is_owed_a_sync_and_one_that_is_gone_nothing() -> None:
    assert treatment(TableState(1, True, False, None, None)) is Treatment.OWE
    assert treatment(None) is Treatment.IGNORE


def test_a_task_that_came_and_went_is_noticed() -> None:
    before = TableState(1, False, False, "t1", None)
    assert not may_have_missed(before, before)
    assert may_have_missed(before, TableState(1, False, False, "t2", None))
    assert may_have_missed(before, TableState(2, False, False, "t1", None))
    assert may_have_missed(before, TableState(1, False, False, "t1", TaskType.SYNC))
    assert may_have_missed(None, before)
    assert not may_have_missed(before, None)
