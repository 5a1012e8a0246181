"""A run's process that is told to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from embedd_dagster.defs import stopping
from embedd_dagster.defs.stopping import WorkerStopped, stop_signal


@pytest.fixture
def interrupted() -> Iterator[list[int]]:
    """The signals that reach what stands for Dagster's own handler."""
    heard: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)

    previous = signal.signal(signal.SIGTERM, hear)
    yield heard
    signal.signal(signal.SIGTERM, previous)


def test_a_second_signal_for_the_same_end_does_not_interrupt_what_the_run_is_doing(interrupted: list[int]) -> None:
    with stop_signal(lambda: False) as should_stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(WorkerStopped):
            should_stop()
    assert interrupted == []


def test_a_signal_that_comes_much_later_reaches_dagster(
    interrupted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_HELD_BACK_SECONDS", -1.0)
    with stop_signal(lambda: False):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupted == [signal.SIGTERM]


def test_a_run_that_somebody_cancelled_is_told_so(interrupted: list[int]) -> None:
    with stop_signal(lambda: True) as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()
    assert interrupted == []
