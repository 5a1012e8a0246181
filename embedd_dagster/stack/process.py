"""Processes and everything that descends from them: start so that none is orphaned, find, stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

STATE_DIR_MARKER = "EMBEDD_STACK_STATE_DIR"
CHILD_MARKER = "EMBEDD_STACK_CHILD"
SUPERVISOR_MARKER = "EMBEDD_STACK_SUPERVISOR"
"""Every process of a stack carries these in its environment, grandchildren too. A process group or a session would
lose those that open their own; a parent's pid is lost when the parent dies."""

Process = psutil.Process
_LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a child runs as, where that is not the caller."""

    name: str
    uid: int
    gid: int


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    output: IO[bytes],
    death_signal: signal.Signals = signal.SIGKILL,
    account: Account | None = None,
) -> subprocess.Popen[bytes]:
    """The started child, in a session of its own, that gets `death_signal` when the calling *thread* ends.

    The thread, because Linux says so: call it from one that lives as long as the child shall. Elsewhere than on Linux
    the child outlives a killed parent, until `marked_processes` finds it.
    """
    run_as = f"{account.uid}:{account.gid}" if account else "-"
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(int(death_signal)), run_as, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        cwd=directory,
        start_new_session=True,
    )


def marked_processes(
    state_dir: Path, child: str | None = None, *, supervisor: str | None = None
) -> list[psutil.Process]:
    """The live processes of the stack in `state_dir`, or of one child of it, without the caller and its ancestors.

    `supervisor` leaves out those of another supervisor than the one with this marker. Of PostgreSQL only the main process is
    found: its backends write over their environment, and end with it.
    """
    wanted = {STATE_DIR_MARKER: str(state_dir), CHILD_MARKER: child, SUPERVISOR_MARKER: supervisor}
    excluded = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        if process.pid in excluded:
            continue
        with contextlib.suppress(psutil.Error, OSError):  # it is gone, or somebody else's
            environment = process.environ()
            if all(value in (None, environment.get(name)) for name, value in wanted.items()):
                found.append(process)
    return found


def supervisor_marker() -> str:
    """What the children of this process carry as SUPERVISOR_MARKER."""
    return f"{os.getpid()}:{create_time(os.getpid())!r}"


def find_supervisors(state_dir: Path) -> list[psutil.Process]:
    """The live processes that started the stack's children, without the caller: told by the children themselves.

    Needs no file, so it also finds the supervisor of a state directory that was removed.
    """
    found: dict[int, psutil.Process] = {}
    for child in marked_processes(state_dir):
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            pid, _, created = child.environ().get(SUPERVISOR_MARKER, "").partition(":")
            if int(pid) != os.getpid() and is_alive(int(pid), float(created)):
                found[int(pid)] = psutil.Process(int(pid))
    return list(found.values())


def is_alive(pid: int, create_time: float) -> bool:
    """Whether this process is alive: its pid alone may belong to another one."""
    try:
        process = psutil.Process(pid)
        return bool(pid > 0 and abs(process.create_time() - create_time) < 1 and _runs(process))
    except psutil.Error:
        return False


def descendants(pid: int) -> list[psutil.Process]:
    """Children, their children and so on; none where the process is gone."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def working_in(directory: Path, name: str) -> Iterator[psutil.Process]:
    """The processes of that name whose working directory it is."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name() == name and Path(process.cwd()) == directory:
                yield process


def find(pid: int) -> psutil.Process | None:
    """The live process of that pid."""
    try:
        process = psutil.Process(pid)
    except psutil.Error:
        return None
    return process if _runs(process) else None


def name_of(process: psutil.Process) -> str:
    """The program's name; empty where the process is gone."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def create_time(pid: int) -> float:
    """When it was started, in seconds since the epoch; now where it has ended already."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return time.time()


def send(processes: Iterable[psutil.Process], signal_number: signal.Signals) -> None:
    """Signalled, those that still live."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal_number)


def wait_until_gone(processes: Iterable[psutil.Process], timeout_seconds: float) -> list[psutil.Process]:
    """Those that are still alive after the timeout; a zombie counts as gone, even if its parent has not reaped it."""
    deadline = time.monotonic() + timeout_seconds
    remaining = list(processes)
    while True:
        remaining = [process for process in remaining if _runs(process)]
        if not remaining or time.monotonic() >= deadline:
            return remaining
        time.sleep(0.03)


def end(processes: Iterable[psutil.Process], *, grace_seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
    """All gone: asked first, killed when the grace period is over."""
    processes = list(processes)
    send(processes, first)
    remaining = wait_until_gone(processes, grace_seconds)
    send(remaining, signal.SIGKILL)
    wait_until_gone(remaining, 5)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
