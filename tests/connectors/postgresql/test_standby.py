"""A source that is a read-only replica: a real standby, streaming from a real primary."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from embedd_dagster.connectors.registry import open_source
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.protocols.source import Selection
from embedd_dagster.stack.postgres import EmbeddedPostgres
from embedd_dagster.stack.postgres_location import run_as


@pytest.fixture(scope="module")
def standby(postgres: EmbeddedPostgres) -> Iterator[dict[str, Any]]:
    """The credentials of a standby of the session's server, which has the table `items`."""
    with psycopg.connect(postgres.url(), autocommit=True) as primary:
        primary.execute("DROP TABLE IF EXISTS items")
        primary.execute("CREATE TABLE items AS SELECT n AS id, 'text ' || n AS body FROM generate_series(1, 300) n")
        primary.execute("ALTER TABLE items ADD PRIMARY KEY (id)")
    directory = Path(tempfile.mkdtemp(prefix="embedd-standby-"))
    directory.chmod(0o711)
    replica = EmbeddedPostgres(directory)
    location = replica.location
    location.data.mkdir(mode=0o700)
    if location.account:
        os.chown(location.data, location.account.uid, location.account.gid)
    program = str(location.binaries / "pg_basebackup")
    copied = run_as(location.account, [program, "-d", postgres.url(), "-D", str(location.data), "-R", "-c", "fast"])
    assert copied.returncode == 0, copied.stdout
    # its users and their passwords are the primary's
    (directory / "postgres" / "password").write_text(make_url(postgres.url()).password or "")
    try:
        with replica:
            address = make_url(replica.url())
            yield {
                "host": address.host,
                "port": address.port,
                "database": address.database,
                "user": address.username,
                "password": address.password,
            }
    finally:
        replica.remove()
        shutil.rmtree(directory, ignore_errors=True)
        with psycopg.connect(postgres.url(), autocommit=True) as primary:
            primary.execute("DROP TABLE items")


def test_a_standby_is_read_like_any_source(postgres: EmbeddedPostgres, standby: dict[str, Any]) -> None:
    names = {"dbname": standby["database"], **{name: standby[name] for name in ("host", "port", "user", "password")}}
    with psycopg.connect(**names) as connection:
        assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
    with open_source("postgresql", standby) as source:
        source.check()
        source.check_key("items", "id")
        reader = source.reader(Selection("items", "id", ("body",)))
        assert reader.count() == 300
        rows = [
            row
            for part in reader.split(3)
            for page in reader.read(part, page_rows=50, page_bytes=2**20)
            for row in page
        ]
        assert [row.key for row in rows] == list(range(1, 301))
        before = reader.digest(4)
        with psycopg.connect(postgres.url(), autocommit=True) as primary:
            primary.execute("UPDATE items SET body = 'changed' WHERE id = 7")
        deadline = time.monotonic() + 60
        while reader.digest(4).changed_buckets(before) == []:
            assert time.monotonic() < deadline, "the change did not reach the standby"
            time.sleep(0.1)
        assert next(reader.read_keys([7], page_bytes=999))[0].values == ("changed",)
        last = list(reader.read(KeyRange(299, None), page_rows=5, page_bytes=2**20))
        assert [row.key for page in last for row in page] == [300]
