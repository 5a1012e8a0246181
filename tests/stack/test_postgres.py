"""The embedded PostgreSQL, really started."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psycopg
import pytest

from embedd_dagster.stack import postgres_location, process
from embedd_dagster.stack.ports import LOOPBACK
from embedd_dagster.stack.postgres import EmbeddedPostgres, PostgresInUse, PostgresStartFailed, open_temporary_postgres
from embedd_dagster.stack.postgres_location import remove_location
from embedd_dagster.stack.process import Account, find, wait_until_gone

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="about dropping root's rights")


@pytest.fixture
def state_dir():
    # pytest's tmp_path is one that no other user can enter.
    directory = Path(tempfile.mkdtemp(prefix="embedd-test-"))
    directory.chmod(0o755)
    yield directory
    remove_location(directory / "postgres")
    shutil.rmtree(directory, ignore_errors=True)


def ask(url, query):
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchone()[0]


def test_a_fresh_server_is_complete_and_lets_in_by_password_only():
    with open_temporary_postgres(max_wal_senders="7") as postgres:
        url = postgres.ensure_database('odd "name"/%')
        assert postgres.ensure_database('odd "name"/%') == url
        assert ask(url, "SELECT current_database()") == 'odd "name"/%'
        assert ask(url, "SHOW wal_level") == "logical"
        assert ask(url, "SHOW max_wal_senders") == "7"
        assert ask(url, "SHOW fsync") == "on"
        assert ask(url, "SHOW listen_addresses") == LOOPBACK
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        for credentials in ("embedd", "embedd:wrong"):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(f"postgresql://{credentials}@{LOOPBACK}:{postgres.port}/postgres")
        pid, directory = postgres.pid, postgres.location.root
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"postgresql://embedd@{LOOPBACK}:{postgres.port + 1}/postgres", connect_timeout=2)
    assert find(pid) is None
    assert not directory.exists()


def test_data_password_and_port_outlive_a_stop(state_dir):
    postgres = EmbeddedPostgres(state_dir)
    with postgres:
        url = postgres.ensure_database("kept")
    with postgres:
        assert postgres.url("kept") == url
        assert ask(url, "SELECT 1") == 1
    assert (state_dir / "postgres" / "password").stat().st_mode & 0o777 == 0o600
    port = int(url.rpartition(":")[2].partition("/")[0])
    with socket.create_server((LOOPBACK, port)), postgres:
        assert postgres.port != port
        assert ask(postgres.url("kept"), "SELECT 1") == 1


def test_a_second_owner_is_refused_and_the_first_goes_on(state_dir):
    with EmbeddedPostgres(state_dir) as first:
        with pytest.raises(PostgresInUse):
            EmbeddedPostgres(state_dir).start()
        assert ask(first.url(), "SELECT 1") == 1


@pytest.mark.parametrize("stale_pid", [None, os.getpid()], ids=["its own pid", "a pid of another process"])
def test_starts_over_the_pid_file_of_a_killed_server(state_dir, stale_pid):
    postgres = EmbeddedPostgres(state_dir)
    postgres.start()
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 41 AS n")
    os.kill(postgres.pid, signal.SIGKILL)
    postgres._child.wait()
    postgres.release()
    pid_file = postgres.location.data / "postmaster.pid"
    assert pid_file.exists()
    if stale_pid:
        pid_file.write_text("\n".join([str(stale_pid), *pid_file.read_text().splitlines()[1:]]) + "\n")
    with EmbeddedPostgres(state_dir) as again:
        assert ask(again.url(), "SELECT n FROM t") == 41


def test_a_killed_owner_takes_its_server_along(state_dir):
    script = f"""
        import time; from pathlib import Path; from embedd_dagster.stack.postgres import EmbeddedPostgres
        postgres = EmbeddedPostgres(Path({str(state_dir)!r})); postgres.start(); print(postgres.pid, flush=True)
        time.sleep(60)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    server = find(int(owner.stdout.readline()))
    owner.kill()
    owner.communicate()
    with EmbeddedPostgres(state_dir) as again:  # at once: it has to wait for the old one
        assert ask(again.url(), "SELECT 1") == 1
        assert not wait_until_gone([server], 0)


def test_says_why_it_does_not_start(state_dir):
    postgres = EmbeddedPostgres(state_dir, options={"no_such_setting": "1"})
    with pytest.raises(PostgresStartFailed, match="no_such_setting"):
        postgres.start()
    with EmbeddedPostgres(state_dir):
        pass


@needs_root
def test_below_a_private_directory_it_settles_elsewhere_and_loosens_nothing(state_dir, monkeypatch):
    private = state_dir / "private"
    private.mkdir(mode=0o700)
    wheel = postgres_location._wheel_directory()
    shutil.copytree(wheel, private / "site" / wheel.name)
    shutil.copytree(wheel.with_name(f"{wheel.name}.libs"), private / "site" / f"{wheel.name}.libs")
    monkeypatch.setattr(postgres_location, "_wheel_directory", lambda: private / "site" / wheel.name)
    postgres = EmbeddedPostgres(private / "checkout")
    try:
        with postgres:
            assert ask(postgres.url(), "SELECT 1") == 1
            location = postgres.location
        for path in (location.data, location.binaries):
            assert private not in path.parents
        assert location.data.stat().st_mode & 0o777 == 0o700
        assert private.stat().st_mode & 0o777 == 0o700
        with EmbeddedPostgres(private / "checkout") as again:
            assert again.location == location
    finally:
        postgres.remove()
    assert not location.root.exists()


@needs_root
def test_works_as_a_normal_user(state_dir, monkeypatch):
    user = pwd.getpwnam("daemon")
    os.chown(state_dir, user.pw_uid, user.pw_gid)
    wheel = postgres_location._wheel_directory()
    if not postgres_location._binaries_reachable(
        wheel / "pginstall/bin", Account(user.pw_name, user.pw_uid, user.pw_gid)
    ):
        # The tests' own environment lies where that user cannot go; one of theirs would not.
        binaries = postgres_location._copied_binaries(wheel, state_dir)
        monkeypatch.setattr(postgres_location, "_wheel_directory", lambda: binaries.parent.parent)
        launcher = shutil.copy(process._LAUNCHER, state_dir)
        monkeypatch.setattr(process, "_LAUNCHER", Path(launcher))
    if (pid := os.fork()) == 0:
        # A fork, for the interpreter of the tests may lie where that user cannot go; what it starts is on the PATH.
        code = 1
        try:
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            sys.executable = shutil.which("python3", path=os.defpath)
            with EmbeddedPostgres(state_dir) as postgres:
                assert postgres.location.account is None
                code = 0 if ask(postgres.url(), "SELECT 1") == 1 else 2
        except BaseException as error:
            print(error, file=sys.stderr)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
