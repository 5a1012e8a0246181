"""PostgreSQL 18 with pgvector out of a wheel, as a child process that dies with its owner."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from embedd_dagster.errors import PermanentError
from embedd_dagster.stack import files, process
from embedd_dagster.stack.ports import LOOPBACK, Ports
from embedd_dagster.stack.postgres_location import Location, find_location, known_root, remove_location, run_as

SUPERUSER = "embedd"
START_TIMEOUT_SECONDS = 60.0
STOP_GRACE_SECONDS = 15.0

_OPTIONS = {
    "wal_level": "logical",  # change data capture reads the log of this server too
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",  # a socket's path has at most 107 characters, a state directory's may have more
    "max_connections": "200",  # three Dagster services, the API and runs, each with a pool
    "timezone": "UTC",
    "log_timezone": "UTC",
    # the client gets the detail of a failed statement; in the log it would keep a row's content
    "log_min_messages": "log",
    "logging_collector": "off",  # the owner keeps the log
}


class PostgresStartFailed(PermanentError):
    """PostgreSQL did not start; the message holds its last log lines."""

    default_resolution = "Read the log named in the message; or name your own PostgreSQL in EMBEDD_DATABASE_URL."


class PostgresInUse(PermanentError):
    """Another live process runs the server of this state directory."""

    default_resolution = "Stop that one first (`embedd down`), or choose another state directory."


class EmbeddedPostgres:
    """One server under one state directory: its data, its password and its port outlive a stop.

    `with EmbeddedPostgres(directory) as postgres:` starts and stops it. A supervisor that keeps the process itself
    calls `prepare()` and runs `command()` as `account`, with SIGINT to stop it; `release()` when it is done.
    """

    def __init__(self, state_dir: Path, *, options: Mapping[str, str] | None = None) -> None:
        """`options` are settings as in postgresql.conf; they win over the ones set here."""
        self._directory = state_dir.resolve() / "postgres"
        self._options = {**_OPTIONS, **(options or {})}
        self._lock = files.OwnerLock(self._directory / "owner.lock")
        self._ports = Ports(self._directory / "port.json")
        self._location: Location | None = None
        self._port: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The loopback port: that of the last start if it is free, otherwise a new one. Known from `prepare` on."""
        if self._port is None:
            raise RuntimeError("the port is chosen by prepare()")
        return self._port

    @property
    def location(self) -> Location:
        """Where binaries and data lie, and whose they are."""
        if self._location is None:
            self._location = find_location(self._directory)
        return self._location

    @property
    def known_root(self) -> Path:
        """The directory that holds the data; nothing is created for the answer."""
        return known_root(self._directory)

    @property
    def pid(self) -> int | None:
        """Of the server that `start` started."""
        return self._child.pid if self._child else None

    def prepare(self) -> None:
        """The data directory exists, no other server is on it, and the port is chosen.

        Raises:
            PostgresInUse: A live process owns this server.
            PostgresStartFailed: The data directory could not be created.
        """
        newly_owned = not self._lock.held
        if not self._lock.acquire():
            raise PostgresInUse(f"The PostgreSQL under {self._directory} is already run by another process.")
        try:
            self._end_predecessor()
            if not self.location.data.exists():
                self._initialize()
            elif not files.read_text(self._password_path):
                raise PostgresStartFailed(
                    f"{self._password_path} is missing or empty: it holds the password of the database in {self.location.data}.",
                    resolution="Put it back from a backup. To give up what is stored: embedd down --remove-state",
                )
            if self._port is None:
                self._port = self._ports.claim("postgres")
        except BaseException:
            if newly_owned:
                self._lock.release()
            raise

    def command(self) -> list[str]:
        """The server in the foreground."""
        options = {**self._options, "port": str(self.port)}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [str(self.location.binaries / "postgres"), "-D", str(self.location.data), *settings]

    def start(self) -> None:
        """Running and answering.

        Raises:
            PostgresInUse: A live process owns this server.
            PostgresStartFailed: It ended, or did not answer in time.
        """
        if self._child is not None:
            return
        self.prepare()
        try:
            with self._log_path.open("ab") as log:
                self._child = process.spawn(
                    self.command(),
                    environment=self.environment,
                    directory=Path("/"),
                    output=log,
                    death_signal=signal.SIGINT,
                    account=self.location.account,
                )
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ended with a clean shutdown; open connections are cut. Does nothing where it does not run."""
        if self._child is not None:
            if self._child.poll() is None:
                self._child.send_signal(signal.SIGINT)
            try:
                self._child.wait(STOP_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None
        self.release()

    def release(self) -> None:
        """Free for another owner; the server must be down."""
        self._lock.release()
        self._port = None

    def remove(self) -> None:
        """Stopped, and its data gone from the disk."""
        self.stop()
        remove_location(self._directory)
        self._location = None

    def url(self, database: str = "postgres") -> str:
        """`postgresql://user:password@127.0.0.1:port/database`, with a superuser's rights."""
        return f"postgresql://{SUPERUSER}:{quote(self._password())}@{LOOPBACK}:{self.port}/{quote(database, safe='')}"

    def ensure_database(self, name: str) -> str:
        """The URL of the database of that name, which is created where there is none."""
        create_database(self.url(), name)
        return self.url(name)

    def is_ready(self) -> bool:
        """Whether it lets us in now."""
        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def environment(self) -> dict[str, str]:
        """All that the server may know of ours: PG… variables of a user's shell would change its settings."""
        return {"PATH": os.defpath, "LC_ALL": "C"}

    @property
    def _log_path(self) -> Path:
        return self._directory / "postgres.log"

    @property
    def _password_path(self) -> Path:
        return self._directory / "password"

    def _password(self) -> str:
        password = files.read_text(self._password_path)
        if not password:
            password = secrets.token_urlsafe(24)
            files.write_private(self._password_path, password)
        return password

    def _initialize(self) -> None:
        location = self.location
        workshop = Path(tempfile.mkdtemp(prefix=".initdb-", dir=location.root))
        try:
            password_file = workshop / "password"
            files.write_private(password_file, self._password())
            if location.account:
                for path in (workshop, password_file):
                    os.chown(path, location.account.uid, location.account.gid)
            options = ["--username", SUPERUSER, "--auth", "scram-sha-256", "--encoding", "UTF8"]
            # The server's own provider: it sorts the same on every machine, without its locales.
            options += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--locale", "C"]
            # Iterations protect a weak password against a stolen verifier. Ours has 192 random bits, and 4,096 iterations
            # cost 6 ms of CPU per connection: Dagster's daemon opens some twenty per second.
            options += ["-c", "scram_iterations=1"]
            command = [str(location.binaries / "initdb"), "-D", str(workshop / "data"), *options]
            done = run_as(location.account, [*command, "--pwfile", str(password_file)])
            if done.returncode != 0:
                raise PostgresStartFailed(
                    f"PostgreSQL could not create its data directory in {location.root}:\n{done.stdout[-2000:].strip()}"
                )
            (workshop / "data").rename(location.data)  # whole or not at all, if we are killed meanwhile
        finally:
            shutil.rmtree(workshop, ignore_errors=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self.is_ready():
            ended = self._child is None or self._child.poll() is not None
            if ended or time.monotonic() > deadline:
                lines = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-15:])
                what = "ended at once" if ended else f"did not answer within {START_TIMEOUT_SECONDS:.0f} s"
                raise PostgresStartFailed(f"PostgreSQL {what}. The end of {self._log_path}:\n{lines}")
            time.sleep(0.03)

    def _end_predecessor(self) -> None:
        """Nobody uses the data directory any more, and no pid file says so.

        After a kill -9 of its owner the old server may still be shutting down; after a kill -9 of the server its
        backends may still be at work for a moment, and the pid in its file may belong to another process.
        """
        pid_file = self.location.data / "postmaster.pid"
        if not pid_file.exists():
            return
        users = self._data_users()
        main_pid = _first_number(pid_file)
        process.send((user for user in users if user.pid == main_pid), signal.SIGINT)
        remaining = process.wait_until_gone(users, STOP_GRACE_SECONDS)
        process.send(remaining, signal.SIGKILL)
        if process.wait_until_gone([*remaining, *self._data_users()], STOP_GRACE_SECONDS):
            raise PostgresInUse(f"Processes that do not end use {self.location.data}.")
        pid_file.unlink(missing_ok=True)

    def _data_users(self) -> list[Any]:
        # Every process of a server works in its data directory.
        return list(process.working_in(self.location.data.resolve(), "postgres"))


@contextlib.contextmanager
def open_temporary_postgres(**options: str) -> Iterator[EmbeddedPostgres]:
    """A running server for tests, removed afterwards. `options` as in postgresql.conf."""
    # Not under a test's own temporary directory, which no other user can enter.
    directory = Path(tempfile.mkdtemp(prefix="embedd-postgres-"))
    directory.chmod(0o711)
    postgres = EmbeddedPostgres(directory, options=options)
    try:
        with postgres:
            yield postgres
    finally:
        postgres.remove()
        shutil.rmtree(directory, ignore_errors=True)


def create_database(server_url: str, name: str) -> None:
    """The server has a database of that name; an existing one is left as it is."""
    keywords: dict[str, Any] = {"autocommit": True, "connect_timeout": 10}
    # Two at once: the loser's error means that it is there.
    already_there = contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation)
    with psycopg.connect(server_url, **keywords) as connection, already_there:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def _first_number(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
