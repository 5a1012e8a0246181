"""When the demo gives up, and what it leaves."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import demo


def test_the_demo_gives_up_only_when_nothing_has_moved_for_the_whole_limit():
    now = [0.0]
    stalled = demo.StallClock(300, clock=lambda: now[0])
    for rows in range(50):  # slow, and moving: far longer than the limit
        now[0] += 299
        assert not stalled.has_run_out(("running", rows))
    now[0] += 299
    assert not stalled.has_run_out(("running", 49))
    now[0] += 2
    assert stalled.has_run_out(("running", 49))


def test_a_failed_demo_keeps_its_state_and_says_where(monkeypatch, tmp_path):
    kept = tmp_path / "demo [x]"

    def make(prefix):
        (kept / "logs").mkdir(parents=True)
        return str(kept)

    @contextmanager
    def failing(*_args, **_kwargs):
        raise ConfigurationError("The disk [a] is full.", resolution="Free some space.")
        yield

    monkeypatch.setattr(demo.tempfile, "mkdtemp", make)
    monkeypatch.setattr(demo, "running_stack", failing)
    with pytest.raises(demo.DemoFailed, match="is full") as caught:
        demo.run_demo(Console(markup=False))
    assert str(kept / "logs") in caught.value.resolution
    assert (kept / "logs").is_dir()
    assert "request id" not in caught.value.resolution


def test_no_default_advice_points_to_a_request_id_outside_of_the_api():
    assert "request id" not in demo.DemoFailed("x").resolution


def test_the_demo_removes_its_state_when_it_is_interrupted(monkeypatch, tmp_path):
    state = tmp_path / "demo"

    def make(prefix):
        state.mkdir()
        return str(state)

    @contextmanager
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(demo.tempfile, "mkdtemp", make)
    monkeypatch.setattr(demo, "running_stack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(Console(markup=False))
    assert not Path(state).exists()
