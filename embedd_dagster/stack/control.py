"""A stack as seen from another process: how it is, and how to end it, also when its supervisor was killed."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import structlog

from embedd_dagster.errors import EmbeddError
from embedd_dagster.stack import files, process
from embedd_dagster.stack.postgres import EmbeddedPostgres

DEFAULT_STATE_DIR = Path(".embedd")
# Longer than all that the supervisor waits for at its end: what is killed cannot hand its work back.
DOWN_TIMEOUT_SECONDS = 120.0
_SERVER_GRACE_SECONDS = 15.0
_LITTLE_SPACE_BYTES = 32 * 1024 * 1024

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


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a supervisor wrote about itself."""

    pid: int
    create_time: float
    state: str
    children: Mapping[str, Mapping[str, Any]]


def down(state_dir: Path = DEFAULT_STATE_DIR) -> bool:
    """Nothing of the stack is left; tells whether there was anything.

    Stops a supervisor that lives, and what one that was killed has left behind, also where the state directory was removed.
    The supervisor is the process that called `start`: where that was a program, it gets SIGTERM all the same.
    """
    state_dir = state_dir.resolve()
    if not state_dir.is_dir():
        return end_leftovers(state_dir)
    lock = files.OwnerLock(state_dir / "stack.lock")
    was_running = not lock.acquire()
    if was_running:
        supervisor = _find_supervisor(state_dir)
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

    Where another user may not enter the state directory, PostgreSQL's data lies in one of its own (see `postgres_location`).
    """
    down(state_dir)
    EmbeddedPostgres(state_dir.resolve()).remove()
    shutil.rmtree(state_dir, ignore_errors=True)


def status(state_dir: Path = DEFAULT_STATE_DIR) -> StackStatus:
    """How the stack is, without disturbing it: `degraded` while a process of it is down."""
    state_dir = state_dir.resolve()
    recorded = _read_state(state_dir)
    if recorded is None or not process.is_alive(recorded.pid, recorded.create_time):
        found = process.find_supervisors(state_dir)  # the file may be damaged, or gone
        if not found:
            return StackStatus(running=False, state="stopped", pid=None, endpoints=None, children={})
        recorded = _Recorded(found[0].pid, 0.0, "unknown", {})
    children = {name: _as_it_is(child) for name, child in recorded.children.items()}
    state = recorded.state
    if state == "ready" and any(child["state"] != "ready" for child in children.values()):
        state = "degraded"
    return StackStatus(
        running=True, state=state, pid=recorded.pid, endpoints=_read_endpoints(state_dir), children=children
    )


def find_problems(state_dir: Path, found: StackStatus) -> list[str]:
    """What is wrong with a running stack now, in sentences: asks the API, and looks at the disk."""
    if not found.running:
        return []
    # the last problem of a child that is ready again is history
    down_children = [child for child in found.children.values() if child["state"] != "ready"]
    problems = [str(child["problem"]) for child in down_children if child.get("problem")]
    if found.state == "unknown":
        problems.append(f"{state_dir.resolve() / 'stack.json'} is missing or damaged.")
    for directory in {state_dir.resolve(), EmbeddedPostgres(state_dir).known_root}:
        problems += _space_problem(directory)
    if found.endpoints is not None:
        problems += _ask_ready(found.endpoints.api)
    return problems


def end_leftovers(state_dir: Path) -> bool:
    """Nothing of another supervisor's stack is left, nor that supervisor; tells whether anything was.

    The caller holds the lock. Another supervisor can be alive all the same if the state directory was removed.
    """
    supervisors = process.find_supervisors(state_dir)
    process.end(supervisors, grace_seconds=DOWN_TIMEOUT_SECONDS)
    found = {one.pid: one for one in process.marked_processes(state_dir)}
    recorded = _read_state(state_dir)
    server = recorded.children.get("postgres") if recorded else None
    if server and server["pid"] and process.is_alive(server["pid"], server["create_time"]):
        found.update({one.pid: one for one in [process.find(server["pid"])] if one is not None})
    if found:
        _log.warning("leftovers_ended", pids=sorted(found), reason="the supervisor before was killed")
        servers = {pid for pid, one in found.items() if process.name_of(one) == "postgres"}
        process.end([one for pid, one in found.items() if pid not in servers], grace_seconds=5)
        process.end([found[pid] for pid in servers], grace_seconds=_SERVER_GRACE_SECONDS, first=signal.SIGINT)
    for name in ("stack.json", "endpoints.json"):
        (state_dir / name).unlink(missing_ok=True)
    return bool(found or supervisors)


def _find_supervisor(state_dir: Path) -> process.Process | None:
    recorded = _read_state(state_dir)
    if recorded is not None and process.is_alive(recorded.pid, recorded.create_time):
        return process.find(recorded.pid)
    return next(iter(process.find_supervisors(state_dir)), None)


def _read_state(state_dir: Path) -> _Recorded | None:
    """None where nothing was written, or what was written is damaged."""
    content = files.read_json(state_dir / "stack.json")
    children = content.get("children", {})
    try:
        whole = all(
            isinstance(child["state"], str)
            and isinstance(child["pid"], int | None)
            and isinstance(child["create_time"], int | float)
            for child in children.values()
        )
        recorded = _Recorded(int(content["pid"]), float(content["create_time"]), str(content["state"]), children)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return recorded if whole else None


def _read_endpoints(state_dir: Path) -> Endpoints | None:
    """None where nothing was written, or what was written is damaged."""
    content = files.read_json(state_dir / "endpoints.json")
    known = {field.name for field in dataclasses.fields(Endpoints)}
    if content.keys() != known or not all(isinstance(value, str) for value in content.values()):
        return None
    return Endpoints(**content)


def _as_it_is(child: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was recorded, corrected where the process is gone: the record is not written while the disk is full."""
    if child["state"] not in ("ready", "starting"):
        return child
    alive = child["pid"] is not None and process.is_alive(child["pid"], child["create_time"])
    return child if alive else {**child, "state": "down"}


def _space_problem(directory: Path) -> list[str]:
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return [f"{directory} cannot be read: {error.strerror}."]
    if free >= _LITTLE_SPACE_BYTES:
        return []
    return [
        f"The disk that holds {directory} is full: {free // 1024} KB are left. Free some space; the rest comes by itself."
    ]


def _ask_ready(api: str) -> list[str]:
    try:
        answer = httpx.get(f"{api}/ready", timeout=10, trust_env=False)
        if answer.is_success:
            return []
        return [str(answer.json()["error"]["message"])]
    except (httpx.TransportError, ValueError, KeyError, TypeError) as error:
        return [f"The API at {api} does not answer: {type(error).__name__}."]


def _acquire_soon(lock: files.OwnerLock) -> bool:
    deadline = time.monotonic() + 5
    while not lock.acquire():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def describe_running(state_dir: Path) -> str:
    """A sentence for a person who tried to start it again."""
    present = status(state_dir)
    where = (
        "it is starting"
        if present.endpoints is None
        else f"API {present.endpoints.api}, Dagster {present.endpoints.dagster}"
    )
    return f"embedd is already running from {state_dir} (process {present.pid}): {where}."
