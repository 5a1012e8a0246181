"""Children that crash, hang, fork and refuse to stop."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from embedd_dagster.stack.process import find, marked_processes
from embedd_dagster.stack.supervisor import LOG_LIMIT_BYTES, ChildFailed, ChildSpec, ChildState, Supervisor

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def supervisor(tmp_path):
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.stop(*supervisor.describe())
    supervisor.close()
    assert not marked_processes(tmp_path)


def child(tmp_path, name="child", code=SLEEP, is_ready=lambda: True, **others):
    command = [sys.executable, "-S", "-c", code]
    return ChildSpec(
        name=name, command=command, environment=dict(os.environ), directory=tmp_path, is_ready=is_ready, **others
    )


def until(condition, timeout_seconds=60):
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return result


def run(supervisor, *specs):
    for spec in specs:
        supervisor.add(spec)
    supervisor.start(*(spec.name for spec in specs))
    supervisor.wait_ready(*(spec.name for spec in specs))


def test_a_crashed_child_is_restarted_and_that_is_told(supervisor, tmp_path):
    run(supervisor, child(tmp_path))
    first = supervisor.pid("child")
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.pid("child") not in (None, first))
    supervisor.wait_ready("child")
    told = supervisor.describe()["child"]
    assert told["restart_count"] == 1
    assert "SIGKILL" in told["problem"]


def test_a_child_of_one_that_ignores_signals_can_be_asked_to_stop(supervisor, tmp_path):
    """As under a shell's script, which ignores SIGINT for what it starts with `&`."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(supervisor, child(tmp_path, code="import signal\nwhile True: signal.pause()"))
        until(lambda: "pause" in " ".join(find(supervisor.pid("child")).cmdline()[:4]))
        status = Path(f"/proc/{supervisor.pid('child')}/status").read_text()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert not [number for number in before if ignored & 1 << number - 1]


def test_a_child_that_cannot_run_is_given_up_with_its_last_words(supervisor, tmp_path):
    with pytest.raises(ChildFailed, match=r"(?s)child ended with exit code 3, 2 times in a row.*no such luck"):
        run(supervisor, child(tmp_path, code="print('no such luck'); raise SystemExit(3)", is_ready=lambda: False))
    assert supervisor.describe()["child"]["state"] == ChildState.FAILED


def test_one_that_ran_once_gets_more_chances_and_a_new_one_when_started_by_hand(supervisor, tmp_path, monkeypatch):
    monkeypatch.setattr("embedd_dagster.stack.supervisor._BACKOFF_SECONDS", (0.01,))
    flag = tmp_path / "broken"
    code = f"import os, time\nif os.path.exists({str(flag)!r}): raise SystemExit(4)\ntime.sleep(60)"
    run(supervisor, child(tmp_path, code=code))
    flag.touch()
    os.kill(supervisor.pid("child"), signal.SIGKILL)
    until(lambda: supervisor.describe()["child"]["state"] == ChildState.FAILED)
    assert "5 times in a row" in supervisor.describe()["child"]["problem"]
    flag.unlink()
    supervisor.start("child")
    supervisor.wait_ready("child")


def test_a_command_that_does_not_exist_is_told(supervisor, tmp_path):
    spec = child(tmp_path, is_ready=lambda: False)
    with pytest.raises(ChildFailed, match="No such file"):
        run(supervisor, ChildSpec(**{**{f: getattr(spec, f) for f in spec.__slots__}, "command": ["/no/such"]}))


def test_one_that_never_gets_ready_is_given_up(supervisor, tmp_path):
    with pytest.raises(ChildFailed, match="was not ready within 0 s"):
        run(supervisor, child(tmp_path, is_ready=lambda: False, ready_timeout_seconds=0.3))


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", stubborn], start_new_session=True)
open("grandchild", "w").write(str(child.pid))
time.sleep(60)
"""


@pytest.mark.parametrize("crash", [False, True])
def test_grandchildren_go_with_their_parent_even_from_a_session_of_their_own(supervisor, tmp_path, crash):
    pid_file = tmp_path / "grandchild"
    run(supervisor, child(tmp_path, code=FAMILY, grace_seconds=0.5))
    until(lambda: pid_file.exists() and pid_file.read_text())
    time.sleep(0.3)  # until it ignores SIGTERM
    grandchild, parent = int(pid_file.read_text()), supervisor.pid("child")
    if crash:
        os.kill(parent, signal.SIGKILL)
        until(lambda: supervisor.pid("child") not in (None, parent))
    else:
        supervisor.stop("child")
        assert supervisor.describe()["child"]["state"] == ChildState.STOPPED
    assert find(parent) is None
    assert find(grandchild) is None


def test_a_stopped_child_stays_down_until_started(supervisor, tmp_path):
    run(supervisor, child(tmp_path), child(tmp_path, "other"))
    supervisor.stop("child")
    time.sleep(0.5)
    assert supervisor.pid("child") is None
    assert supervisor.pid("other") is not None
    supervisor.start("child")
    supervisor.wait_ready("child")


def test_an_overgrown_log_is_set_aside_at_the_start(supervisor, tmp_path):
    log = tmp_path / "logs" / "child.log"
    log.parent.mkdir()
    log.write_bytes(b"x" * (LOG_LIMIT_BYTES + 1))
    run(supervisor, child(tmp_path))
    assert log.stat().st_size < 1000
    assert log.with_name("child.log.1").stat().st_size > LOG_LIMIT_BYTES


CHATTY = """
import time
for number in range(400):
    print(number, "x" * 100, flush=True)
    time.sleep(0.005)
time.sleep(60)
"""


def test_the_log_of_a_child_that_lives_long_stays_small(supervisor, tmp_path, monkeypatch):
    monkeypatch.setattr("embedd_dagster.stack.supervisor.LOG_LIMIT_BYTES", 10_000)
    log = tmp_path / "logs" / "child.log"
    run(supervisor, child(tmp_path, code=CHATTY))
    pid = supervisor.pid("child")
    until(lambda: log.exists() and "399 x" in log.read_text())
    assert log.stat().st_size < 20_000
    aside = log.with_name("child.log.1").read_text()
    assert 10_000 < len(aside) < 20_000
    assert "\0" not in log.read_text() + aside, "it goes on at the end of what is there"
    assert supervisor.pid("child") == pid
