"""A real PgBouncer in front of a PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL

PROGRAM = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")


@contextmanager
def pgbouncer(target: URL, pool_mode: str, *, pool_size: int = 1, auth_type: str = "scram-sha-256") -> Iterator[URL]:
    """The URL of the target behind a pooler, whose `pool_size` server sessions all clients of a user share."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="embedd-pgbouncer-"))
    folder.chmod(0o755)
    users, configuration = folder / "users", folder / "pgbouncer.ini"
    users.write_text(f'"{target.username}" "{target.password}"\n')
    configuration.write_text(
        "[databases]\n"
        f"* = host={target.host} port={target.port}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = {auth_type}\nauth_file = {users}\n"
        f"pool_mode = {pool_mode}\ndefault_pool_size = {pool_size}\nmax_client_conn = 100\n"
    )
    assert PROGRAM is not None
    command = [PROGRAM, str(configuration)]
    if os.geteuid() == 0:  # which it refuses to be
        command[1:1] = ["-u", "nobody"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = target.set(host="127.0.0.1", port=port)
        _wait_until_ready(url, server, folder / "log")
        yield url
    finally:
        server.kill()
        server.wait(60)
        shutil.rmtree(folder)


def _wait_until_ready(url: URL, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url.render_as_string(hide_password=False)).close()
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return
