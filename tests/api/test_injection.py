"""Hostile names and values through the API and the engine, over the PostgreSQL source and both stores.

Each is a name that somebody may really have, or a value that stands in a row; none may become a part of a statement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import URL

from api.app import create_app
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.engine.run import run_task
from tests.api.tenants import Tenant, code_of
from tests.support.openai_server import running_openai_server

HOSTILE_NAMES = [
    'x"; DROP TABLE victims; --', "x'; DROP TABLE victims; --", 'a"b', 'a""b', "''", "%s", "%(x)s", "%%", "{}", "{0}",
    "$1", ":name", "?", "a.b", "a[0]", "a[]", "$ne", "--", "/* x */", "back\\slash", "E'\\x41'", "tab\there", "new\nline",
    " lead", "trail ", "select", "NULL", "é☠中", "\u202ertl", "z̷a̸l", "\U0001f4a9", "embedding", "pk_value", "metadata",
    "row_hash", "ctid2", "x" * 63, "\x01\x7f",
]  # fmt: skip
HOSTILE_VALUES = [
    "' OR '1'='1", "'; DROP TABLE victims; --", '"', "\\", "\\'", "%s", "{}", "$1", "null", "", " ", "\\x00", "$$", "☠",
    "x" * 5000, "a\nb\tc", '{"$or": []}', "\U0001f4a9", "\\u0000", "\ufeff", "é", "e\u0301",
]  # fmt: skip


class Place:
    """A tenant, its provider, and a database with something to lose."""

    def __init__(self, tenant: Tenant, mode: str, provider_url: str) -> None:
        self.tenant, self.mode = tenant, mode
        self.url = tenant.source.render_as_string(hide_password=False)
        self.connection = tenant.connection(mode)["id"]
        body = {"name": uuid4().hex, "provider": "openai", "credentials": {"base_url": provider_url}}
        self.provider = tenant.made("/v1/embedding-providers", body)["id"]
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS victims AS SELECT 1 AS alive")

    def create_source(self, table: str, key: str, columns: list[str], rows: list[list[str]]) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            described = [sql.SQL("{} text").format(sql.Identifier(name)) for name in columns]
            connection.execute(
                sql.SQL("CREATE TABLE {} ({} text PRIMARY KEY, {})").format(
                    sql.Identifier(table), sql.Identifier(key), sql.SQL(", ").join(described)
                )
            )
            for row in rows:  # literals: psycopg takes a % in a name for a placeholder once there are parameters
                values = sql.SQL(", ").join(map(sql.Literal, row))
                connection.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier(table), values))

    def body(self, table: str, key: str, text: str, metadata: list[str]) -> dict[str, Any]:
        columns = [{"name": text, "role": "embedding", "name_prefix": "%s{}'\";: "}]
        columns += [{"name": name, "role": "metadata", "filter_type": "keyword"} for name in metadata]
        return {
            "name": f"t';\"-- {uuid4().hex}", "connection_id": self.connection, "embedding_provider_id": self.provider,
            "source_table": '"' + table.replace('"', '""') + '"', "primary_key_column": key, "columns": columns,
            "embedding_model": "mine", "embedding_dimensions": 16, "mode": self.mode,
        }  # fmt: skip

    def build(self, body: dict[str, Any]) -> str:
        table_id: str = self.tenant.made("/v1/vector-tables", body)["id"]
        task_id = self.tenant.made(f"/v1/vector-tables/{table_id}/backfill", None)["task_id"]
        assert isinstance(self.tenant.client.app, FastAPI)
        runtime = self.tenant.client.app.state.embedd.runtime
        run_task(runtime, task_id, uuid4().hex, log=lambda _text: None, should_stop=lambda: False)
        return table_id

    def query(self, table_id: str, filters: Any = None) -> dict[str, dict[str, Any]]:
        body = {"query": "'; DROP TABLE victims; --", "limit": 100, "filters": filters}
        response = self.tenant.post(f"/v1/vector-tables/{table_id}/query", body)
        assert response.status_code == 200, response.text
        return {row["id"]: row["metadata"] for row in response.json()["results"]}

    def assert_unharmed(self) -> None:
        with psycopg.connect(self.url) as connection:
            assert connection.execute("SELECT alive FROM victims").fetchall() == [(1,)]

    def prove(self, table: str, key: str, text: str, metadata: list[str], values: list[str]) -> None:
        """Every row comes back as it is, and is found by each of its values alone."""
        rows = [
            [value, f"text of {n}", *[f"{value}{place}" for place in range(len(metadata))]]
            for n, value in enumerate(values)
        ]
        self.create_source(table, key, [text, *metadata], rows)
        table_id = self.build(self.body(table, key, text, metadata))
        expected = {row[0]: dict(zip(metadata, row[2:], strict=True)) for row in rows}
        assert self.query(table_id) == expected
        for value in values:
            for place, name in enumerate(metadata):
                assert self.query(table_id, {name: f"{value}{place}"}).keys() == {value}
        first = metadata[0]
        assert self.query(table_id, {first: {"in": [f"{value}0" for value in values]}}).keys() == set(values)
        assert self.query(table_id, {"$or": [{name: {"neq": "'"}} for name in metadata]}).keys() == set(values)
        self.assert_unharmed()


@pytest.fixture(scope="module", params=["managed", "platform"])
def place(
    request: pytest.FixtureRequest, settings: Any, catalog: Catalog, source: URL, qdrant_url: str
) -> Iterator[Place]:
    with (
        running_openai_server() as server,
        TestClient(create_app(settings.model_copy(update={"qdrant_url": qdrant_url}))) as client,
    ):
        yield Place(Tenant.create(client, catalog, source), request.param, server.base_url)


def test_hostile_columns(place: Place) -> None:
    mark = uuid4().hex[:6]
    place.prove(f"hostile columns {mark}", "key", "text", HOSTILE_NAMES[:20], ["a"])
    place.prove(f"more of them {mark}", "key", "text", HOSTILE_NAMES[20:], ["b"])


def test_hostile_values(place: Place) -> None:
    place.prove(f"hostile values {uuid4().hex[:6]}", "id", "text", ["meta"], [*HOSTILE_VALUES])


@pytest.mark.parametrize("name", [*HOSTILE_NAMES[:6], "{}", "a.b", "☠", "new\nline"])
def test_hostile_tables_keys_and_texts(place: Place, name: str) -> None:
    place.prove(f"{name}{uuid4().hex[:4]}"[-60:], name, f"t{name}", ["m"], ["v"])


_letters = st.characters(codec="utf-8", exclude_characters="\x00")
_name = st.text(st.one_of(_letters, st.sampled_from("\"';%{}$.[]\\-: ")), min_size=1, max_size=12).filter(
    lambda name: name != "$or"
)


@hypothesis_settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(data=st.data())
def test_any_names_and_values(place: Place, data: st.DataObject) -> None:
    names = data.draw(st.lists(_name, min_size=4, max_size=8, unique_by=str.casefold))
    values = data.draw(st.lists(st.text(_letters, min_size=1, max_size=20), min_size=1, max_size=3, unique=True))
    table = f"{names[0]}{uuid4().hex[:6]}"
    place.prove(table, names[1], names[2], names[3:], values)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES[:14], "x" * 255])
def test_names_that_are_not_there(place: Place, name: str) -> None:
    tenant, good = place.tenant, place.body("products", "id", "title", ["category"])
    column = {"name": name, "role": "metadata", "filter_type": "keyword"}
    for change in (
        {"source_table": name},
        {"source_table": f'"{name}'},
        {"source_table": f"public.{name}"},
        {"primary_key_column": name},
        {"columns": [*good["columns"], column]},
    ):
        response = tenant.post("/v1/vector-tables", {**good, **change})
        assert (response.status_code, code_of(response)) in {
            (404, "source_table_not_found"),
            (422, "validation_error"),
        }, (change, response.text)
    place.assert_unharmed()


def test_limits_of_a_vector_table(place: Place) -> None:
    tenant, good = place.tenant, place.body("products", "id", "title", ["category"])
    column = good["columns"][1]
    for change, says in (
        ({"columns": [{**column, "name": f"c{n}"} for n in range(201)]}, "columns: at most 200"),
        ({"source_table": "x" * 256}, "source_table: at most 255"),
        ({"source_table": "a\x00b"}, "NUL"),
        ({"columns": [{**column, "name": "a\x00"}]}, "NUL"),
        ({"columns": [{**column, "name": ""}]}, "at least 1 character"),
        ({"embedding_model": "x" * 201}, "embedding_model: at most 200"),
        ({"columns": [{**good["columns"][0], "name_prefix": "x" * 1001}]}, "at most 1000"),
    ):
        begun = time.monotonic()
        response = tenant.post("/v1/vector-tables", {**good, **change})
        assert (response.status_code, code_of(response)) == (422, "validation_error"), change
        assert says in response.json()["error"]["message"]
        assert time.monotonic() - begun < 2
