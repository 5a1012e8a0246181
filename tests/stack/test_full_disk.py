"""A stack on a file system that is really full."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from embedd_dagster.stack.control import discard, find_problems
from embedd_dagster.stack.stack import down, status
from tests.stack.test_stack import first_url, until, up

SIZE = "400m"


@pytest.fixture
def small_disk():
    """A mounted file system of its own."""
    directory = Path(tempfile.mkdtemp(prefix="embedd-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0755", "none", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        directory.rmdir()
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(directory, ignore_errors=True)


def fill(path):
    """Takes every byte that is left."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(b"x" * 65_536):
            pass
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(b"x"):
            pass


def write_wal_until_postgresql_dies(url):
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(1000):
            connection.execute("SELECT pg_logical_emit_message(false, 'test', repeat('x', 1000000), true)")
    raise AssertionError("it did not run out of space")


def test_a_stack_on_a_full_disk_tells_the_truth_and_comes_back_by_itself(small_disk):
    state_dir = small_disk / "state"
    supervisor = up(state_dir)
    try:
        first_url(supervisor)
        url = status(state_dir).endpoints.database_url
        fill(small_disk / "filler")
        with pytest.raises(psycopg.Error):
            write_wal_until_postgresql_dies(url)
        fill(small_disk / "filler")  # what PostgreSQL gave back at its end
        os.kill(status(state_dir).children["api"]["pid"], signal.SIGKILL)
        until(lambda: status(state_dir).state == "degraded")
        assert any("is full" in problem for problem in find_problems(state_dir, status(state_dir)))
        assert supervisor.poll() is None
        (small_disk / "filler").unlink()

        def is_whole_again():
            seen = status(state_dir)
            return seen.state == "ready" and {child["state"] for child in seen.children.values()} == {"ready"}

        until(is_whole_again, timeout_seconds=300)
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert find_problems(state_dir, status(state_dir)) == []
        assert supervisor.poll() is None
        assert down(state_dir)
        assert supervisor.wait(60) == 0
    finally:
        discard(state_dir)
        supervisor.communicate()
