"""Keeps child processes running: starts them, tells when they are ready, restarts what crashes, stops all of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from embedd_dagster.errors import PermanentError
from embedd_dagster.stack import process

LOG_LIMIT_BYTES = 10 * 1024 * 1024
# A crash after so long a life begins a new count: it is an accident, not a child that cannot run.
SETTLED_AFTER_SECONDS = 30.0
CRASH_LIMIT = 5
CRASH_LIMIT_BEFORE_READY = 2  # a child that never ran is wrong in itself: say so soon
# A child that ran before fails for a reason outside it, such as a full disk, and that may end at any time.
RETRY_FAILED_SECONDS = 30.0
_BACKOFF_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0)
_POLL_SECONDS = 0.1

_log = structlog.get_logger(__name__)


class ChildFailed(PermanentError):
    """A child crashed too often; the message holds the last lines of its log."""

    default_resolution = "Read the log that the message names."


class Interrupted(PermanentError):
    """Somebody asked for the end while the start was going on."""

    default_resolution = "Start again."


class ChildState(StrEnum):
    """Where a child stands."""

    STOPPED = "stopped"  # nobody wants it to run
    WAITING = "waiting"  # to be started, at once or after a pause
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"  # crashed too often; one that was ready before is tried again from time to time


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to run one child."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    is_ready: Callable[[], bool]
    """Asked again and again after the start; an exception counts as no."""
    before_start: Callable[[], None] = _nothing
    """Runs before each start, restarts too."""
    account: process.Account | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    """What it gets when the supervisor is killed."""
    ends_its_own_children: bool = False
    """Then only the child itself is asked to stop; otherwise all its descendants too."""
    ready_timeout_seconds: float = 120.0
    grace_seconds: float = 10.0


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    log_path: Path
    popen: subprocess.Popen[bytes] | None = None
    create_time: float = 0.0
    state: ChildState = ChildState.STOPPED
    was_ready: bool = False
    started_at: float = 0.0
    next_start_at: float = 0.0
    crash_count: int = 0
    restart_count: int = 0
    problem: str | None = None


class Supervisor:
    """The children of one state directory. All methods may be called from any thread."""

    def __init__(self, state_dir: Path, *, on_change: Callable[[], None] = _nothing) -> None:
        """`on_change` is called after each change of a child's state, from the thread that made it."""
        self._state_dir = state_dir
        self._marker = process.supervisor_marker()
        self._on_change = on_change
        self._children: dict[str, _Child] = {}
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._closed = False
        # One thread starts every child, for as long as the supervisor lives: see `process.spawn`.
        self._thread: threading.Thread | None = None

    def add(self, spec: ChildSpec) -> None:
        """Registers a child without starting it."""
        log_dir = self._state_dir / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._children[spec.name] = _Child(spec, log_dir / f"{spec.name}.log")

    def start(self, *names: str) -> None:
        """Starts them; returns at once. A child that was given up is tried again."""
        with self._lock:
            for name in names:
                child = self._children[name]
                if child.state in (ChildState.STOPPED, ChildState.FAILED):
                    child.state, child.next_start_at = ChildState.WAITING, 0.0
                    child.crash_count, child.problem = 0, None
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="embedd-supervisor", daemon=True)
                self._thread.start()
        self._wake.set()

    def wait_ready(self, *names: str, interrupted: threading.Event | None = None) -> None:
        """All of them are ready.

        Raises:
            ChildFailed: One of all children, also of those not named, was given up.
            Interrupted: The event was set meanwhile.
        """
        interrupted = interrupted or threading.Event()
        while True:
            with self._lock:
                problems = [child.problem for child in self._children.values() if child.state is ChildState.FAILED]
                waiting = [name for name in names if self._children[name].state is not ChildState.READY]
            if problems:
                raise ChildFailed("\n".join(problem or "" for problem in problems))
            if not waiting:
                return
            if interrupted.wait(_POLL_SECONDS / 2):
                raise Interrupted(f"Interrupted while waiting for {', '.join(waiting)}.")

    def stop(self, *names: str, hurry: threading.Event | None = None) -> None:
        """Ended, with all that descends from them, and not restarted; killed where the grace period did not do.

        Several are asked at the same moment. `hurry` ends the grace period early.
        """
        with self._lock:
            children = [self._children[name] for name in names]
            for child in children:
                child.state = ChildState.STOPPED
        trees = {child.spec.name: self._ask_to_stop(child) for child in children}
        for child in children:
            deadline = time.monotonic() + child.spec.grace_seconds
            remaining = trees[child.spec.name]
            while remaining and time.monotonic() < deadline and not (hurry and hurry.is_set()):
                remaining = process.wait_until_gone(remaining, 0.1)
            if remaining:
                _log.warning("child_killed", child=child.spec.name, reason="it did not stop when asked")
            # Also what was started while the others were being asked.
            process.end([*remaining, *self._descendants(child)], grace_seconds=0, first=signal.SIGKILL)
            if child.popen is not None:
                child.popen.wait()
            child.popen = None
        self._report_change()

    def close(self) -> None:
        """The watching thread is gone; every child must be stopped before, for they die with it."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def has_died(self) -> bool:
        """Whether the thread that watches the children has ended by itself; on Linux the children end with it."""
        return self._thread is not None and not self._thread.is_alive() and not self._closed

    def pid(self, name: str) -> int | None:
        """Of the running child; none while it is down."""
        popen = self._children[name].popen
        return popen.pid if popen is not None and popen.poll() is None else None

    def describe(self) -> dict[str, dict[str, Any]]:
        """The state of each child, as JSON."""
        with self._lock:
            return {
                name: {
                    "state": str(child.state),
                    "pid": child.popen.pid if child.popen else None,
                    "create_time": child.create_time,
                    "restart_count": child.restart_count,
                    "problem": child.problem,
                    "log": str(child.log_path),
                }
                for name, child in self._children.items()
            }

    def _watch(self) -> None:
        while not self._closed:
            changed = False
            for child in list(self._children.values()):
                try:
                    changed |= self._advance(child)
                except Exception as error:  # noqa: BLE001 - this thread's end is every child's end
                    _log.error("child_not_supervised", child=child.spec.name, error=f"{type(error).__name__}: {error}")
                    self._wake.wait(1)
                _bound(child.log_path)
            if changed:
                self._report_change()
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _report_change(self) -> None:
        try:
            self._on_change()
        except OSError as error:  # such as a full disk: the children are still supervised
            _log.error("change_not_reported", error=str(error))

    def _advance(self, child: _Child) -> bool:
        """Whether the child moved to another state.

        What may take long, `before_start` and `is_ready`, runs without the lock: `stop` must not wait for it.
        """
        before = child.state
        if self._is_due(child):
            self._spawn(child)
        elif child.state in (ChildState.STARTING, ChildState.READY) and (popen := child.popen) is not None:
            ready = child.state is ChildState.STARTING and popen.poll() is None and _is_ready(child.spec)
            with self._lock:
                if child.state is not before:  # stopped meanwhile
                    return False
                exit_code = popen.poll()
                if exit_code is not None:
                    self._crashed(child, _describe_exit(exit_code))
                elif child.state is ChildState.STARTING:
                    self._mark_ready(child, ready=ready)
        return child.state is not before

    def _is_due(self, child: _Child) -> bool:
        waits = child.state is ChildState.WAITING or (child.state is ChildState.FAILED and child.was_ready)
        return waits and time.monotonic() >= child.next_start_at

    def _spawn(self, child: _Child) -> None:
        before = child.state
        problem: Exception | None = None
        try:
            child.spec.before_start()
        except Exception as error:  # noqa: BLE001 - the other children must continue
            problem = error
        with self._lock:
            if child.state is not before:  # stopped meanwhile
                return
            try:
                if problem is not None:
                    raise problem
                self._spawn_now(child)
            except Exception as error:  # noqa: BLE001 - as above
                self._crashed(child, f"could not be started: {error}")

    def _spawn_now(self, child: _Child) -> None:
        spec = child.spec
        _bound(child.log_path)
        with child.log_path.open("ab") as log:
            child.popen = process.spawn(
                spec.command,
                environment={
                    **spec.environment,
                    process.STATE_DIR_MARKER: str(self._state_dir),
                    process.CHILD_MARKER: spec.name,
                    process.SUPERVISOR_MARKER: self._marker,
                },
                directory=spec.directory,
                output=log,
                death_signal=spec.death_signal,
                account=spec.account,
            )
        child.create_time = process.create_time(child.popen.pid)
        child.started_at = time.monotonic()
        child.state = ChildState.STARTING

    def _mark_ready(self, child: _Child, *, ready: bool) -> None:
        if ready:
            child.state, child.was_ready = ChildState.READY, True
            if child.restart_count:
                _log.info("child_ready_again", child=child.spec.name, restart_count=child.restart_count)
        elif time.monotonic() - child.started_at > child.spec.ready_timeout_seconds:
            self._crashed(child, f"was not ready within {child.spec.ready_timeout_seconds:.0f} s")

    def _crashed(self, child: _Child, what: str) -> None:
        # Its descendants, such as run workers, must not run next to those of the restarted child.
        process.end(self._descendants(child), grace_seconds=2)
        if child.popen is not None:
            if child.popen.poll() is None:
                child.popen.kill()
            child.popen.wait()
            child.popen = None
        if child.was_ready and time.monotonic() - child.started_at > SETTLED_AFTER_SECONDS:
            child.crash_count = 0
        child.crash_count += 1
        limit = CRASH_LIMIT if child.was_ready else CRASH_LIMIT_BEFORE_READY
        name = child.spec.name
        if child.crash_count >= limit:
            child.state = ChildState.FAILED
            child.next_start_at = time.monotonic() + RETRY_FAILED_SECONDS
            then = f"it is tried again every {RETRY_FAILED_SECONDS:.0f} s" if child.was_ready else "it is given up"
            child.problem = (
                f"{name} {what}, {child.crash_count} times in a row; {then}. "
                f"The end of {child.log_path}:\n{_last_lines(child.log_path)}"
            )
            _log.error("child_given_up", child=name, problem=child.problem)
            return
        pause_seconds = _BACKOFF_SECONDS[min(child.crash_count, len(_BACKOFF_SECONDS)) - 1]
        child.problem = f"{name} {what}; restarted."
        child.restart_count += 1
        child.next_start_at = time.monotonic() + pause_seconds
        child.state = ChildState.WAITING
        _log.warning("child_crashed", child=name, what=what, restart_in_seconds=pause_seconds, log=str(child.log_path))

    def _ask_to_stop(self, child: _Child) -> list[process.Process]:
        """All processes of the child, each asked to end."""
        others = self._descendants(child)
        leader = []
        if child.popen is not None and (found := process.find(child.popen.pid)):
            leader = [found]
            process.send(leader, child.spec.stop_signal)
        if not child.spec.ends_its_own_children:
            process.send(others, signal.SIGTERM)
        return [*leader, *others]

    def _descendants(self, child: _Child) -> list[process.Process]:
        found = {one.pid: one for one in process.marked_processes(self._state_dir, child.spec.name)}
        if child.popen is not None:
            found.update({one.pid: one for one in process.descendants(child.popen.pid)})
            found.pop(child.popen.pid, None)
        return list(found.values())


def _is_ready(spec: ChildSpec) -> bool:
    try:
        return spec.is_ready()
    except Exception as error:  # noqa: BLE001 - the child may be fine: it is given up only if this goes on
        _log.warning("readiness_unknown", child=spec.name, error=f"{type(error).__name__}: {error}")
        return False


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"


def _last_lines(path: Path, count: int = 20) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return "(there is no log)"


def _bound(log: Path) -> None:
    """Sets an overgrown log aside, and empties it: the child goes on writing into the same file, at its end.

    What it writes just then may be lost. A disk that is full must not end the supervision, nor keep a log from shrinking.
    """
    with suppress(OSError):
        if log.stat().st_size > LOG_LIMIT_BYTES:
            with suppress(OSError):
                shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
