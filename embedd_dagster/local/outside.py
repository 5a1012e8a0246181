"""A stack as seen from another process: how it is, and how to end it, also when its supervisor was killed."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import structlog

from embedd_dagster.errors import EmbeddError
from embedd_dagster.local import files, process
from embedd_dagster.local.postgres import EmbeddedPostgres

DEFAULT_STATE_DIR = Path(".embedd")
DOWN_TIMEOUT_SECONDS = 60.0

_log = structlog.get_logger(__name__)


class StackAlreadyRunning(EmbeddError):
    """Another live process runs the stack of this state directory; the message holds its URLs."""

    default_resolution = "Use that one, or stop it with `embedd down`."


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running stack is reached."""

    api: str
    dagster: str
    dagster_login: str
    """Signs a browser in to Dagster's UI: not for a log."""
    qdrant: str
    qdrant_api_key: str
    """Empty where it asks for none."""
    database_url: str

    @property
    def dagster_token(self) -> str:
        """What programs send to Dagster's webserver, as `Authorization: Bearer …`."""
        return parse_qs(urlsplit(self.dagster_login).query)["token"][0]


@dataclass(frozen=True, slots=True)
class StackStatus:
    """What is known of a state directory's stack from outside."""

    running: bool
    state: str
    pid: int | None
    endpoints: Endpoints | None
    children: Mapping[str, Mapping[str, Any]]


def down(state_dir: Path = DEFAULT_STATE_DIR) -> bool:
    """Nothing of the stack is left; tells whether there was anything.

    Stops a supervisor that lives, and what one that was killed has left behind. The supervisor is the process that called
    `start`: where that was a program, it gets SIGTERM all the same.
    """
    state_dir = state_dir.resolve()
    if not state_dir.is_dir():
        return False
    lock = files.OwnerLock(state_dir / "stack.lock")
    was_running = not lock.acquire()
    if was_running:
        pid = files.read_json(state_dir / "stack.json").get("pid")
        supervisor = process.find(pid) if isinstance(pid, int) else None
        if supervisor is not None:
            process.end([supervisor], grace_seconds=DOWN_TIMEOUT_SECONDS)
        if not _acquire_soon(lock):
            raise StackAlreadyRunning(describe_running(state_dir), resolution="Somebody starts it again and again.")
    try:
        return end_leftovers(state_dir) or was_running
    finally:
        lock.release()


def discard(state_dir: Path = DEFAULT_STATE_DIR) -> None:
    """Nothing of the stack runs, and nothing of it is left on the disk, also not what had to lie elsewhere.

    Where another user may not enter the state directory, PostgreSQL's data lies in one of its own (see `postgres_place`).
    """
    down(state_dir)
    EmbeddedPostgres(state_dir.resolve()).remove()
    shutil.rmtree(state_dir, ignore_errors=True)


def status(state_dir: Path = DEFAULT_STATE_DIR) -> StackStatus:
    """How the stack is, without disturbing it."""
    state_dir = state_dir.resolve()
    state = files.read_json(state_dir / "stack.json")
    running = bool(state) and process.is_alive(int(state["pid"]), float(state["create_time"]))
    endpoints = files.read_json(state_dir / "endpoints.json") if running else {}
    return StackStatus(
        running=running,
        state=str(state["state"]) if running else "stopped",
        pid=int(state["pid"]) if running else None,
        endpoints=Endpoints(**endpoints) if endpoints else None,
        children=state.get("children", {}) if running else {},
    )


def end_leftovers(state_dir: Path) -> bool:
    """Nothing of a killed supervisor's stack is left; tells whether anything was. The caller holds the lock."""
    found = {one.pid: one for one in process.marked_processes(state_dir)}
    any_server = False
    for name, child in files.read_json(state_dir / "stack.json").get("children", {}).items():
        pid, create_time = child.get("pid"), child.get("create_time", 0.0)
        # PostgreSQL, whose environment is unreadable, is ended by its own start; here for `down`.
        if name == "postgres" and isinstance(pid, int) and process.is_alive(pid, create_time):
            server = process.find(pid)
            if server is not None:
                process.end([server], grace_seconds=15, first=signal.SIGINT)
                any_server = True
    if found:
        _log.warning("leftovers_ended", pids=sorted(found), reason="the supervisor before was killed")
        process.end(found.values(), grace_seconds=5)
    for name in ("stack.json", "endpoints.json"):
        (state_dir / name).unlink(missing_ok=True)
    return bool(found) or any_server


def _acquire_soon(lock: files.OwnerLock) -> bool:
    deadline = time.monotonic() + 5
    while not lock.acquire():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def describe_running(state_dir: Path) -> str:
    """A sentence for whoever wanted to start it."""
    present = status(state_dir)
    where = (
        "it is starting"
        if present.endpoints is None
        else f"API {present.endpoints.api}, Dagster {present.endpoints.dagster}"
    )
    return f"embedd is already running from {state_dir} (process {present.pid}): {where}."
