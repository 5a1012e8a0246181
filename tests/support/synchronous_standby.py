"""A synchronous standby of the test session's PostgreSQL: a real `pg_receivewal`, which can be stopped and let go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.support.followed_source import wait_until

_NAME = "embedd_test_standby"
WAITS = "SET synchronous_commit = 'on'"
"""Makes the commits of a session wait for the standby. The sessions of all others on the server do not."""


class SynchronousStandby:
    """Acknowledges the log as it comes, unless it is stopped."""

    def __init__(self, postgres: EmbeddedPostgres, directory: str) -> None:
        program = str(postgres.location.binaries / "pg_receivewal")
        command = [program, "--synchronous", "-D", directory, "-d", f"{postgres.url()}?application_name={_NAME}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> None:
        """Acknowledges nothing any more: commits wait."""
        self._process.send_signal(signal.SIGSTOP)
        _pid, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        """Acknowledges what has come meanwhile, and all that comes."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Ends the process, stopped or not."""
        self._process.kill()
        self._process.wait(30)


@contextmanager
def synchronous_standby(postgres: EmbeddedPostgres) -> Iterator[SynchronousStandby]:
    """A running standby, which sessions wait for that say so (`WAITS`)."""
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_commit = 'local'")
        admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{_NAME}'")
        admin.execute("SELECT pg_reload_conf()")
        directory = tempfile.mkdtemp(prefix="embedd-receivewal-")
        standby = SynchronousStandby(postgres, directory)
        try:
            wait_until(lambda: _state(admin) == "sync")
            yield standby
        finally:
            standby.end()
            admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            admin.execute("ALTER SYSTEM RESET synchronous_commit")
            admin.execute("SELECT pg_reload_conf()")
            shutil.rmtree(directory, ignore_errors=True)


def _state(admin: psycopg.Connection[tuple[object, ...]]) -> object:
    row = admin.execute("SELECT sync_state FROM pg_stat_replication WHERE application_name = %s", [_NAME]).fetchone()
    return row and row[0]


@pytest.fixture(scope="module")
def running_standby(postgres: EmbeddedPostgres) -> Iterator[SynchronousStandby]:
    """One for all tests of a module."""
    with synchronous_standby(postgres) as standby:
        yield standby


@pytest.fixture
def standby(running_standby: SynchronousStandby) -> Iterator[SynchronousStandby]:
    """A standby that acknowledges again after the test."""
    yield running_standby
    running_standby.go_on()
