"""All of embedd on one machine under one supervisor: `embedd up`, `embedd down`, and the same for programs and tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg
import structlog

from embedd_dagster.errors import ConfigurationError, EmbeddError, PermanentError
from embedd_dagster.stack import files, installation, process
from embedd_dagster.stack.control import (
    DEFAULT_STATE_DIR,
    Endpoints,
    StackAlreadyRunning,
    StackStatus,
    describe_running,
    down,
    end_leftovers,
    status,
)
from embedd_dagster.stack.ports import LOOPBACK, Ports
from embedd_dagster.stack.postgres import EmbeddedPostgres, create_database
from embedd_dagster.stack.services import Services, service_specs
from embedd_dagster.stack.state_dir import open_state_dir
from embedd_dagster.stack.stop_signals import StopSignals
from embedd_dagster.stack.supervisor import ChildFailed, ChildSpec, Supervisor

__all__ = [
    "DEFAULT_STATE_DIR",
    "Endpoints",
    "Stack",
    "StackAlreadyRunning",
    "StackSettings",
    "StackStatus",
    "StackStopped",
    "down",
    "running_stack",
    "status",
]

# Each group is stopped at one moment, after all that use it are gone.
_STOP_ORDER = (("api", "dagster-webserver", "dagster-daemon"), ("code-server",), ("qdrant",), ("postgres",))

_GUARD_SECONDS = 1.0

_log = structlog.get_logger(__name__)


class StackStopped(PermanentError):
    """The stack ended itself because it could not go on; nobody asked for it."""

    default_resolution = "Start it again with `embedd up`."


def _nothing() -> None:
    return None


def _ignore(_text: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What a test or a demo may change."""

    code_location_module: str = "embedd_dagster.definitions"
    extra_env: Mapping[str, str] = field(default_factory=dict)
    """For every child but PostgreSQL."""
    replace: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Another command for a child, by its name; `{port}` in it stands for the child's port."""
    postgres_options: Mapping[str, str] = field(default_factory=dict)
    migrate: Callable[[str], None] | None = None
    """Called with the catalog's URL instead of the catalog's own migration."""
    tell: Callable[[str], None] = _ignore
    """Called with each step of the start, in words for people."""


class Stack:
    """The stack of one state directory: `up()` until a signal, or `start()` and `stop()` by program."""

    def __init__(self, state_dir: Path = DEFAULT_STATE_DIR, *, settings: StackSettings | None = None) -> None:
        self.state_dir = state_dir.resolve()
        self._settings = settings or StackSettings()
        self._lock = files.OwnerLock(self.state_dir / "stack.lock")
        self._supervisor = Supervisor(self.state_dir, on_change=self._write_state)
        self._postgres: EmbeddedPostgres | None = None
        self._endpoints: Endpoints | None = None
        self._state = "stopped"
        self._state_lock = threading.Lock()
        self._stop_lock = threading.RLock()
        self._children: list[str] = []
        self._stop_asked = threading.Event()
        self._hurry = threading.Event()
        self._stopped = threading.Event()
        self._failure: StackStopped | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoints(self) -> Endpoints:
        """Where it is reached; known while it runs."""
        if self._endpoints is None:
            raise RuntimeError("the stack does not run")
        return self._endpoints

    def up(
        self, *, on_ready: Callable[[Endpoints], None] | None = None, on_stopping: Callable[[], None] = _nothing
    ) -> None:
        """Runs until SIGINT, SIGTERM or SIGHUP, then stops everything; a second signal makes that a short process.

        `on_stopping` is called at once when the first signal arrives, from another thread.

        Raises:
            StackAlreadyRunning: It runs already.
            StackStopped: It could not go on, as its state directory was removed; nothing of it runs any more.
            EmbeddError: It could not be started; what had been started is stopped.
        """
        with StopSignals(self._stop_asked, self._hurry, on_first=on_stopping):
            try:
                self.start()
                try:
                    if on_ready is not None:
                        on_ready(self.endpoints)
                    self._stop_asked.wait()
                finally:
                    self.stop()
            except EmbeddError:
                if not self._stop_asked.is_set():  # otherwise the interruption was requested
                    raise
        if self._failure is not None:
            raise self._failure

    def start(self) -> Endpoints:
        """Everything is started and ready.

        Raises:
            StackAlreadyRunning: It runs already.
            EmbeddError: It could not be started; what had been started is stopped.
        """
        try:
            return self._start()
        except ChildFailed:
            # another program may take a port between its choice and its use: then others are chosen, once
            if not Ports(self.state_dir / "ports.json").any_taken():
                raise
        return self._start()

    def _start(self) -> Endpoints:
        try:
            open_state_dir(self.state_dir)
            if not self._lock.acquire():
                raise StackAlreadyRunning(describe_running(self.state_dir))
            return self._start_locked()
        except OSError as error:
            raise ConfigurationError(
                f"The state directory {self.state_dir} cannot be used: {error.strerror or error}.",
                resolution="Check the space left on its disk and whose it is, or name another with --state-dir.",
            ) from error

    def _start_locked(self) -> Endpoints:
        began_at = time.monotonic()
        try:
            end_leftovers(self.state_dir)
            self._state, self._failure = "starting", None
            self._stopped = threading.Event()
            threading.Thread(target=self._guard, args=[self._stopped], name="embedd-guard", daemon=True).start()
            self._write_state()
            self._start_children()
            self._state = "ready"
            self._write_state()
            self._write_endpoints()
        except BaseException:
            self.stop()
            raise
        _log.info("stack_ready", seconds=round(time.monotonic() - began_at, 1), state_dir=str(self.state_dir))
        return self.endpoints

    def stop(self) -> None:
        """Stops everything in reverse order, including what the children started. Does nothing if nothing runs."""
        with self._stop_lock:
            if not self._lock.held:
                return
            self._stopped.set()
            self._state = "stopping"
            self._write_state()
            self._remove("endpoints.json")
            for group in _STOP_ORDER:
                self._supervisor.stop(*(name for name in group if name in self._children), hurry=self._hurry)
            self._supervisor.close()
            ours = process.marked_processes(self.state_dir, supervisor=process.supervisor_marker())
            process.end(ours, grace_seconds=0)
            if self._postgres is not None:
                self._postgres.release()
            self._endpoints = None
            self._remove("stack.json")
            self._supervisor = Supervisor(self.state_dir, on_change=self._write_state)
            self._children = []
            self._state = "stopped"
            self._lock.release()

    def _guard(self, stopped: threading.Event) -> None:
        """Ends a stack that cannot go on, and writes its files again if they are missing, damaged or out of date."""
        while not stopped.wait(_GUARD_SECONDS):
            if self._failure is None and (reason := self._why_it_cannot_go_on()):
                _log.error("stack_ends", reason=reason)
                self._failure = StackStopped(f"{reason} Everything that it ran was stopped.")
                self._stop_asked.set()  # ends a start that is going on, and `up`
            with self._stop_lock:
                if self._state != "ready":
                    continue
                if self._failure is not None:
                    self.stop()
                    return
                self._write_state()
                self._write_endpoints()

    def _why_it_cannot_go_on(self) -> str | None:
        if not self._lock.in_place:
            return f"The state directory {self.state_dir} was removed or replaced while embedd was running."
        if self._supervisor.has_died:
            return "The supervision of embedd's processes has failed."
        return None

    def child_pid(self, name: str) -> int | None:
        """Of a running child: postgres, qdrant, code-server, dagster-webserver, dagster-daemon or api."""
        return self._supervisor.pid(name)

    def stop_child(self, name: str) -> None:
        """Down until `start_child`: not restarted."""
        self._supervisor.stop(name)

    def start_child(self, name: str) -> None:
        """Up and ready again, also after it was given up."""
        self._supervisor.start(name)
        self._supervisor.wait_ready(name)

    def wait_ready(self) -> None:
        """Every child is ready; after a crash, say."""
        self._supervisor.wait_ready(*self._children)

    def describe(self) -> dict[str, dict[str, Any]]:
        """State, pid, restart count, last problem and log of each child, by name."""
        return self._supervisor.describe()

    def _start_children(self) -> None:
        external = installation.External.of_environment()
        encryption_keys = installation.find_encryption_keys(self.state_dir, external)
        dagster_token = installation.find_dagster_token(self.state_dir, external)
        qdrant_api_key = installation.find_qdrant_api_key(self.state_dir, external)
        remembered = Ports(self.state_dir / "ports.json")
        ports = {name: remembered.claim(name) for name in ("api", "dagster-webserver", "qdrant", "qdrant-grpc")}
        urls = {name: f"http://{LOOPBACK}:{port}" for name, port in ports.items()}
        qdrant_url = external.qdrant_url or urls["qdrant"]

        if external.database_url is None:
            self._postgres = EmbeddedPostgres(self.state_dir, options=self._settings.postgres_options)
            self._settings.tell("preparing PostgreSQL")
            self._postgres.prepare()
            database_url = self._postgres.url(installation.CATALOG_DATABASE)
        else:
            database_url = installation.driver_url(external.database_url, "postgresql")
        dagster_database_url = external.dagster_database_url or installation.sibling_database_url(
            database_url, installation.DAGSTER_DATABASE
        )
        self._endpoints = Endpoints(
            api=urls["api"],
            dagster=urls["dagster-webserver"],
            dagster_login=f"{urls['dagster-webserver']}/login?token={quote(dagster_token, safe='')}",
            qdrant=qdrant_url,
            qdrant_api_key=qdrant_api_key,
            database_url=database_url,
        )

        code_socket = installation.find_code_socket(self.state_dir)
        environment = installation.child_environment(
            database_url=database_url,
            dagster_database_url=dagster_database_url,
            qdrant_url=qdrant_url,
            qdrant_grpc_port=None if external.qdrant_url else ports["qdrant-grpc"],
            dagster_url=urls["dagster-webserver"],
            api_url=urls["api"],
            encryption_keys=encryption_keys,
            qdrant_api_key=qdrant_api_key,
            dagster_token=dagster_token,
            dagster_home=installation.open_dagster_home(self.state_dir),
            code_socket=code_socket,
        )
        services = Services(
            state_dir=self.state_dir,
            environment={**environment, **self._settings.extra_env},
            ports=ports,
            code_socket=code_socket,
            code_location_module=self._settings.code_location_module,
            dagster_database_url=installation.driver_url(dagster_database_url, "postgresql"),
            dagster_token=dagster_token,
            postgres=self._postgres,
            embedded_qdrant=external.qdrant_url is None,
            replace=self._settings.replace,
        )
        self._run(service_specs(services))

    def _run(self, specs: Mapping[str, ChildSpec]) -> None:
        """Starts children after those they need, and independent ones in parallel."""
        self._children = list(specs)
        for spec in specs.values():
            self._supervisor.add(spec)
        independent = [name for name in ("postgres", "qdrant", "code-server") if name in specs]
        self._settings.tell(f"starting {', '.join(independent)}")
        self._supervisor.start(*independent)
        if "postgres" in specs:
            self._supervisor.wait_ready("postgres", interrupted=self._stop_asked)
        self._settings.tell("preparing the catalog's database")
        self._create_databases()
        self._migrate(self.endpoints.database_url)
        self._settings.tell("waiting for the code-server to load Dagster's definitions")
        # a webserver that finds no code server tries again, but not before long
        self._supervisor.wait_ready("code-server", interrupted=self._stop_asked)
        self._settings.tell("starting dagster-webserver, dagster-daemon, api")
        self._supervisor.start("dagster-webserver", "dagster-daemon", "api")
        self._supervisor.wait_ready(*specs, interrupted=self._stop_asked)

    def _create_databases(self) -> None:
        if self._postgres is not None:
            self._postgres.ensure_database(installation.CATALOG_DATABASE)
            self._postgres.ensure_database(installation.DAGSTER_DATABASE)
        elif installation.External.of_environment().dagster_database_url is None:
            try:
                create_database(self.endpoints.database_url, installation.DAGSTER_DATABASE)
            except psycopg.OperationalError as error:
                raise ConfigurationError(
                    f"The database that EMBEDD_DATABASE_URL names does not let us in: {error}",
                    resolution="Check the address and the password, and that it is up.",
                ) from None
            except psycopg.errors.InsufficientPrivilege:
                raise ConfigurationError(
                    f"The user of EMBEDD_DATABASE_URL may not create the database {installation.DAGSTER_DATABASE!r}.",
                    resolution="Create it, owned by that user; or name another in EMBEDD_DAGSTER_DATABASE_URL.",
                ) from None

    def _migrate(self, database_url: str) -> None:
        if self._settings.migrate is not None:
            self._settings.migrate(database_url)
            return
        from embedd_dagster.catalog.migrate import upgrade

        upgrade(database_url)

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "create_time": process.create_time(os.getpid()),
            "state": self._state,
            "children": self._supervisor.describe(),
        }
        self._keep_file("stack.json", state)

    def _write_endpoints(self) -> None:
        self._keep_file("endpoints.json", dataclasses.asdict(self.endpoints))

    def _keep_file(self, name: str, content: dict[str, Any]) -> None:
        """The file has this content; where it cannot be written now, `_guard` tries again."""
        with self._state_lock:
            if not self._lock.in_place:  # somebody removed the state directory: it must not come back half
                return
            try:
                if files.read_json(self.state_dir / name) != content:
                    files.write_json(self.state_dir / name, content)
            except OSError as error:
                _log.error("state_not_written", file=name, error=str(error))

    def _remove(self, name: str) -> None:
        if not self._lock.in_place:
            return
        try:
            (self.state_dir / name).unlink(missing_ok=True)
        except OSError as error:
            _log.error("state_not_removed", file=name, error=str(error))


@contextlib.contextmanager
def running_stack(state_dir: Path = DEFAULT_STATE_DIR, *, settings: StackSettings | None = None) -> Iterator[Endpoints]:
    """The endpoints of a stack that runs for as long as the block does."""
    with Stack(state_dir, settings=settings) as stack:
        yield stack.endpoints
