"""With ten thousand vector tables, what is asked all the time reads an index, never a whole table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from embedd_dagster.catalog import (
    connections,
    due_tables,
    environments,
    failed_rows,
    live_tables,
    migrate,
    resyncs,
    tasks,
    vector_tables,
)
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.pages import Position
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Column, ColumnRole, Mode, SyncMode, VectorConfiguration
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.support.many_tables import fill_catalog, vector_table_id

LARGE = {"vector_tables", "vector_sets", "tasks"}
TABLE = vector_table_id(5000)


@pytest.fixture(scope="module")
def url(postgres: EmbeddedPostgres) -> Iterator[str]:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE test_plans")
    url = postgres.url("test_plans")
    migrate.upgrade(url)
    fill_catalog(url, 1, 10_000)
    yield url
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE test_plans WITH (FORCE)")


@pytest.fixture(scope="module")
def catalog(url: str) -> Iterator[Catalog]:
    opened = Catalog(url, pool_size=2)
    yield opened
    opened.close()


def _read_whole(plan: dict[str, Any]) -> set[str]:
    """The tables that a plan reads from one end to the other."""
    found = {plan["Relation Name"]} if plan["Node Type"] == "Seq Scan" else set()
    return found.union(*(_read_whole(part) for part in plan.get("Plans", ())))


class Explained:
    """Every statement that is sent while this is listening, explained just before."""

    def __init__(self) -> None:
        self.whole: dict[str, set[str]] = {}
        self.statements = 0

    def __call__(self, _connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.split(maxsplit=1)[0] not in {"SELECT", "UPDATE", "DELETE"}:
            return
        self.statements += 1
        raw = cursor.connection.cursor()
        row = raw.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters).fetchone()
        if whole := _read_whole(row[0][0]["Plan"]) & LARGE:
            self.whole[statement] = whole


def _configuration(session: Session) -> tuple[Any, NewVectorTable]:
    environment = environments.ensure_defaults(session)
    columns = (Column("title", ColumnRole.EMBEDDING),)
    configuration = VectorConfiguration("public.t", "id", columns, "m", 3, "ep_many")
    return environment, NewVectorTable("another", "conn_many", configuration, Mode.MANAGED, SyncMode.BATCH)


def _environment_id(session: Session) -> str:
    return environments.ensure_defaults(session).id


def _create(session: Session) -> object:
    environment, new = _configuration(session)
    table = vector_tables.create(session, environment, new)
    session.flush()
    return tasks.create(session, table, TaskType.BACKFILL, max_attempts=3)


_AFTER = Position(now() - timedelta(seconds=9_000), vector_table_id(9_000))

READS: dict[str, Callable[[Session], object]] = {
    "list": lambda s: vector_tables.page(s, _environment_id(s), 20, None),
    "list by name": lambda s: vector_tables.page(s, _environment_id(s), 20, None, name="table 5"),
    "list by status": lambda s: vector_tables.page(s, _environment_id(s), 20, None, sync_status="error"),
    "list by connection": lambda s: vector_tables.page(s, _environment_id(s), 20, None, connection_id="conn_none"),
    "list by source table": lambda s: vector_tables.page(s, _environment_id(s), 20, _AFTER, source_table="public.none"),
    "tasks by name": lambda s: tasks.page(s, _environment_id(s), 20, None, target_id=None, status=None, name="table 5"),
    "list, far down": lambda s: vector_tables.page(s, _environment_id(s), 100, _AFTER),
    "get": lambda s: vector_tables.get(s, _environment_id(s), TABLE),
    "get and lock": lambda s: vector_tables.get(s, _environment_id(s), TABLE, lock=True),
    "create": _create,
    "endpoints": lambda s: vector_tables.load_endpoints(s, TABLE),
    "tasks": lambda s: tasks.page(s, _environment_id(s), 20, None, target_id=None, status=None),
    "tasks, far down": lambda s: tasks.page(s, _environment_id(s), 20, _AFTER, target_id=None, status=None),
    "tasks of a table": lambda s: tasks.page(s, _environment_id(s), 20, None, target_id=TABLE, status=None),
    "live tasks of all": lambda s: tasks.page(s, _environment_id(s), 20, None, target_id=None, status="pending"),
    "live task": lambda s: tasks.find_live(s, TABLE),
    "live tasks": tasks.live_tasks,
    "awaiting rebackfill": due_tables.awaiting_rebackfill,
    "being deleted": due_tables.being_deleted,
    "due for sync": lambda s: due_tables.due_for_sync(s, now()),
    "without next sync": due_tables.without_next_sync,
    "pending resyncs": lambda s: resyncs.due(s, 25),
    "failed rows": lambda s: failed_rows.page(s, TABLE, 20, None),
    "connections": lambda s: connections.page(s, _environment_id(s), 20, None),
}


@pytest.mark.parametrize("name", READS)
def test_no_table_is_read_whole(catalog: Catalog, name: str) -> None:
    engine: Engine = catalog._engine
    explained = Explained()
    event.listen(engine, "before_cursor_execute", explained)
    try:
        with catalog.transaction() as session:
            READS[name](session)
            session.flush()
            session.rollback()
    finally:
        event.remove(engine, "before_cursor_execute", explained)
    assert explained.statements > 0
    assert explained.whole == {}


@pytest.mark.parametrize("statement", [live_tables._ACCESS, live_tables._LIVE_TABLE], ids=["key", "environment"])
@pytest.mark.parametrize("plan_mode", ["force_custom_plan", "force_generic_plan"])
def test_a_query_reads_no_table_whole(url: str, statement: str, plan_mode: str) -> None:
    of_key = (None, "prod", "prod", TABLE, b"")
    parameters: tuple[object, ...] = of_key if "bytea" in statement else (TABLE, "env_1")
    with psycopg.connect(url) as connection:
        types = ", ".join("bytea" if isinstance(value, bytes) else "text" for value in parameters)
        connection.execute(f"SET plan_cache_mode = {plan_mode}")
        numbered = statement
        for number in range(1, len(parameters) + 1):
            numbered = numbered.replace("%s", f"${number}", 1)
        connection.execute(f"PREPARE asked({types}) AS {numbered}")  # type: ignore[arg-type]
        cursor = psycopg.ClientCursor(connection)
        arguments = ", ".join(["%s"] * len(parameters))
        row = cursor.execute(f"EXPLAIN (FORMAT JSON) EXECUTE asked({arguments})", parameters).fetchone()
        assert row is not None
        assert _read_whole(row[0][0]["Plan"]) & LARGE == set()
