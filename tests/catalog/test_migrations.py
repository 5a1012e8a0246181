"""The catalog's migrations: complete, repeatable, and safe to run by several at once."""

from __future__ import annotations

import subprocess
import sys

import psycopg
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, make_url

from embedd_dagster.catalog import migrate
from embedd_dagster.catalog.tables import Base
from embedd_dagster.connectors.postgresql.cdc.slot import lsn_text


def _engine(database_url: str) -> Engine:
    return create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))


def _rows(database_url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database_url) as connection:
        return connection.execute(statement).fetchall()


def test_migrations_make_exactly_the_tables_that_are_mapped(database_url: str) -> None:
    migrate.upgrade(database_url)
    with _engine(database_url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_upgrading_twice_is_the_same_as_once(database_url: str) -> None:
    migrate.upgrade(database_url)
    environments = _rows(database_url, "SELECT id, name FROM environments")
    assert [name for _, name in environments] == ["prod"]
    migrate.upgrade(database_url)
    assert _rows(database_url, "SELECT id, name FROM environments") == environments
    assert _rows(database_url, "SELECT version_num FROM alembic_version") == [("0014",)]


def test_two_processes_may_upgrade_at_once(database_url: str) -> None:
    program = f"from embedd_dagster.catalog.migrate import upgrade; upgrade({database_url!r})"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert _rows(database_url, "SELECT count(*) FROM environments") == [(1,)]


def test_every_migration_can_be_taken_back(database_url: str) -> None:
    migrate.upgrade(database_url)
    config = migrate.alembic_config()
    engine = _engine(database_url)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate.upgrade(database_url)


def test_the_position_of_a_stream_is_kept_when_it_becomes_text(database_url: str) -> None:
    position = 0x16_B374D848
    config = migrate.alembic_config()
    with _engine(database_url).connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0012")
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute("SET session_replication_role = replica")  # no foreign keys: the stream needs no connection here
        admin.execute(
            "INSERT INTO change_feeds (connection_id, name, position, failures, created_at)"
            " VALUES ('conn', 'embedd_conn', %s, 0, now())",
            [position],
        )
    migrate.upgrade(database_url)
    assert _rows(database_url, "SELECT position FROM change_feeds") == [(lsn_text(position),)]
    with _engine(database_url).connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0012")
    assert _rows(database_url, "SELECT position FROM change_feeds") == [(position,)]
