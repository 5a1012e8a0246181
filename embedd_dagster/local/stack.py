"""All of embedd on one machine under one supervisor: `embedd up`, `embedd down`, and the same for programs and tests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg
import structlog

from embedd_dagster.errors import ConfigurationError, EmbeddError
from embedd_dagster.local import files, installation, process
from embedd_dagster.local.outside import (
    DEFAULT_STATE_DIR,
    Endpoints,
    StackAlreadyRunning,
    StackStatus,
    describe_running,
    down,
    end_leftovers,
    status,
)
from embedd_dagster.local.ports import LOOPBACK, Ports
from embedd_dagster.local.postgres import EmbeddedPostgres, create_database
from embedd_dagster.local.services import Services, service_specs
from embedd_dagster.local.supervisor import ChildFailed, ChildSpec, Supervisor

__all__ = [
    "DEFAULT_STATE_DIR",
    "Endpoints",
    "Stack",
    "StackAlreadyRunning",
    "StackSettings",
    "StackStatus",
    "down",
    "running_stack",
    "status",
]

# Each group is stopped at one moment, after all that use it are gone.
_STOP_ORDER = (("api", "dagster-webserver", "dagster-daemon"), ("code-server",), ("qdrant",), ("postgres",))

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What a test or a demo may want otherwise."""

    code_location_module: str = "embedd_dagster.definitions"
    extra_env: Mapping[str, str] = field(default_factory=dict)
    """For every child but PostgreSQL."""
    replace: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Another command for a child, by its name; `{port}` in it stands for the child's port."""
    postgres_options: Mapping[str, str] = field(default_factory=dict)
    migrate: Callable[[str], None] | None = None
    """Called with the catalog's URL instead of the catalog's own migration."""


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
        self._children: list[str] = []
        self._stop_asked = threading.Event()
        self._hurry = threading.Event()

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

    def up(self, *, on_ready: Callable[[Endpoints], None] | None = None) -> None:
        """Runs until SIGINT, SIGTERM or SIGHUP, then stops everything; a second signal makes that a short process.

        Raises:
            StackAlreadyRunning: It runs already.
            EmbeddError: It could not be started; what had been started is stopped.
        """
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asked for just that
            handled.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            self.start()
            try:
                if on_ready is not None:
                    on_ready(self.endpoints)
                self._stop_asked.wait()
            finally:
                self.stop()
        except EmbeddError:
            if not self._stop_asked.is_set():  # else the interruption is what was asked for
                raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self) -> Endpoints:
        """Everything is started and ready.

        Raises:
            StackAlreadyRunning: It runs already.
            EmbeddError: It could not be started; what had been started is stopped.
        """
        try:
            return self._start()
        except ChildFailed:
            # between the choice of a port and its use, somebody else may take it: then others are chosen, once
            if not Ports(self.state_dir / "ports.json").any_taken():
                raise
        return self._start()

    def _start(self) -> Endpoints:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            raise StackAlreadyRunning(describe_running(self.state_dir))
        began_at = time.monotonic()
        try:
            end_leftovers(self.state_dir)
            self._state = "starting"
            self._write_state()
            self._start_children()
        except BaseException:
            self.stop()
            raise
        self._state = "ready"
        self._write_state()
        files.write_json(self.state_dir / "endpoints.json", dataclasses.asdict(self.endpoints))
        _log.info("stack_ready", seconds=round(time.monotonic() - began_at, 1), state_dir=str(self.state_dir))
        return self.endpoints

    def stop(self) -> None:
        """Everything is gone, in reverse order, also what the children started. Does nothing where nothing runs."""
        if not self._lock.held:
            return
        self._state = "stopping"
        self._write_state()
        (self.state_dir / "endpoints.json").unlink(missing_ok=True)
        for group in _STOP_ORDER:
            self._supervisor.stop(*(name for name in group if name in self._children), hurry=self._hurry)
        self._supervisor.close()
        process.end(process.marked_processes(self.state_dir), grace_seconds=0)
        if self._postgres is not None:
            self._postgres.release()
        self._endpoints = None
        (self.state_dir / "stack.json").unlink(missing_ok=True)
        self._supervisor = Supervisor(self.state_dir, on_change=self._write_state)
        self._children = []
        self._state = "stopped"
        self._lock.release()

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
        ports = {name: remembered.claim(name) for name in ("api", "dagster-webserver", "qdrant")}
        urls = {name: f"http://{LOOPBACK}:{port}" for name, port in ports.items()}
        qdrant_url = external.qdrant_url or urls["qdrant"]

        if external.database_url is None:
            self._postgres = EmbeddedPostgres(self.state_dir, options=self._settings.postgres_options)
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
        """In the order of who needs whom, and side by side where nobody does."""
        self._children = list(specs)
        for spec in specs.values():
            self._supervisor.add(spec)
        independent = [name for name in ("postgres", "qdrant", "code-server") if name in specs]
        self._supervisor.start(*independent)
        if "postgres" in specs:
            self._supervisor.wait_ready("postgres", interrupted=self._stop_asked)
        self._create_databases()
        self._migrate(self.endpoints.database_url)
        # a webserver that finds no code server tries again, but not before long
        self._supervisor.wait_ready("code-server", interrupted=self._stop_asked)
        self._supervisor.start("dagster-webserver", "dagster-daemon")
        self._supervisor.start("api")
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

    def _on_signal(self, _number: int, _frame: object) -> None:
        if self._stop_asked.is_set():
            self._hurry.set()
        self._stop_asked.set()

    def _write_state(self) -> None:
        with self._state_lock:
            files.write_json(
                self.state_dir / "stack.json",
                {
                    "pid": os.getpid(),
                    "create_time": process.create_time(os.getpid()),
                    "state": self._state,
                    "children": self._supervisor.describe(),
                },
            )


@contextlib.contextmanager
def running_stack(state_dir: Path = DEFAULT_STATE_DIR, *, settings: StackSettings | None = None) -> Iterator[Endpoints]:
    """The endpoints of a stack that runs for as long as the block does."""
    with Stack(state_dir, settings=settings) as stack:
        yield stack.endpoints
