"""No secret, no question and no row's content leaves for a log, an error, a task, the catalog or the metrics.

Everything is run with canaries, against a provider that repeats what it was sent in its refusals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from uuid import uuid4

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import URL

from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.engine.run import describe, run_task
from embedd_dagster.errors import EmbeddError
from tests.api.tenants import Tenant, unique
from tests.support.canaries import Canaries, search_database
from tests.support.echoing_provider import REFUSED, EchoingProvider, running_echoing_provider

_COLUMNS = [
    {"name": "title", "role": "embedding"},
    {"name": "category", "role": "metadata", "filter_type": "keyword"},
]


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture(scope="module")
def provider(canaries: Canaries) -> Iterator[EchoingProvider]:
    with running_echoing_provider(canaries.provider_key) as running:
        yield running


class Secretive:
    """A tenant whose every secret is a canary, and all that was answered to it."""

    def __init__(self, tenant: Tenant, canaries: Canaries, provider: EchoingProvider) -> None:
        self.tenant, self.canaries, self.provider = tenant, canaries, provider
        self.answers: list[str] = []
        self.log: list[str] = []
        self.role = f"role_{uuid4().hex[:8]}"
        self._make_source()
        tenant.source = tenant.source.set(username=self.role, password=canaries.source_password)

    def _make_source(self) -> None:
        owner = self.tenant.source.render_as_string(hide_password=False)
        row = sql.Literal(self.canaries.row)
        with psycopg.connect(owner, autocommit=True) as connection:
            connection.execute(
                sql.SQL(
                    """CREATE EXTENSION IF NOT EXISTS vector;
                    CREATE ROLE {role} LOGIN PASSWORD {password};
                    CREATE SCHEMA {role} AUTHORIZATION {role};
                    SET ROLE {role};
                    SET search_path = {role};
                    CREATE TABLE rows (id text PRIMARY KEY, title text, category text);
                    INSERT INTO rows SELECT 'k' || n, 'row ' || n || ' ' || {row}, {metadata}
                        FROM generate_series(1, 60) n;
                    INSERT INTO rows VALUES ('bad', {refused} || {row}, {metadata});
                    CREATE VIEW quoting AS SELECT id, category, (title::integer)::text AS title FROM rows;
                    CREATE TABLE uncommon (id text PRIMARY KEY, title text, category text);
                    INSERT INTO uncommon SELECT id, {refused} || title, category FROM rows"""
                ).format(
                    role=sql.Identifier(self.role),
                    password=sql.Literal(self.canaries.source_password),
                    row=row,
                    metadata=sql.Literal(self.canaries.metadata),
                    refused=sql.Literal(REFUSED),
                )
            )

    def send(self, method: str, path: str, body: object = None, *, expect: int, keep: bool = True) -> dict:
        # with a key everywhere, so that answers are kept for it, that with the API key among them
        response = self.tenant.send(method, path, body, headers={"Idempotency-Key": uuid4().hex})
        assert response.status_code == expect, response.text
        if keep:
            self.answers.append(response.text + str(response.headers))
        return response.json() if response.content else {}

    def connection_id(self, mode: str) -> str:
        body = {"name": unique("c"), "mode": mode, "credentials": self.tenant.credentials}
        made = self.send("POST", "/v1/providers/postgresql/connections", body, expect=201)
        assert made["status"] == "connected", made
        return made["id"]

    def provider_id(self, key: str) -> str:
        credentials = {"api_key": key, "base_url": self.provider.base_url}
        body = {"name": unique("p"), "provider": "openai", "credentials": credentials}
        return self.send("POST", "/v1/embedding-providers", body, expect=201)["id"]

    def table(self, mode: str, connection_id: str, provider_id: str, source_table: str) -> str:
        body = {
            "name": unique("t"), "connection_id": connection_id, "embedding_provider_id": provider_id,
            "source_table": f"{self.role}.{source_table}", "primary_key_column": "id", "columns": _COLUMNS,
            "embedding_model": "mine", "embedding_dimensions": 16, "mode": mode,
        }  # fmt: skip
        return self.send("POST", "/v1/vector-tables", body, expect=201)["id"]

    def build(self, table_id: str) -> str:
        """The status of the task; the engine's log lines are kept."""
        task_id = self.send("POST", f"/v1/vector-tables/{table_id}/backfill", expect=200)["task_id"]
        assert isinstance(self.tenant.client.app, FastAPI)
        runtime = self.tenant.client.app.state.embedd.runtime
        for _attempt in range(3):
            try:
                report = run_task(runtime, task_id, uuid4().hex, log=self.log.append, should_stop=lambda: False)
                # the sample is made of metadata: for Dagster's event log it is not; see the e2e test
                self.log.append(str(report.vector_table_id))
            except EmbeddError as error:
                self.log += [str(error), repr(error), describe(error)]
            status = self.send("GET", f"/v1/tasks/{task_id}", expect=200)["status"]
            if status != "pending":
                break
        for path in ("", "/sync/status", "/failed-rows"):
            self.send("GET", f"/v1/vector-tables/{table_id}{path}", expect=200)
        return status

    def query(self, table_id: str, text: str, *, expect: int) -> dict:
        # a good answer repeats the question and tells rows: that is what it is for
        path = f"/v1/vector-tables/{table_id}/query"
        return self.send("POST", path, {"query": text, "limit": 3}, expect=expect, keep=expect != 200)


@pytest.mark.parametrize("mode", ["managed", "platform"])
def test_everything_with_canaries(
    mode: str,
    app_with: Callable[..., TestClient],
    catalog: Catalog,
    catalog_url: str,
    source: URL,
    canaries: Canaries,
    provider: EchoingProvider,
    qdrant_url: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    encryption_key = new_encryption_key()
    client = app_with(qdrant_url=qdrant_url, encryption_keys=(SecretStr(encryption_key),), outage_patience_seconds=1)
    tenant = Tenant.create(client, catalog, source)
    canaries.more.update({"api_key": tenant.key, "encryption_key": encryption_key})
    # an API key that is made over the API: shown once, in that answer alone
    user = Secretive(tenant, canaries, provider)
    made = user.send("POST", "/v1/api-keys", {"name": "k"}, expect=201, keep=False)
    canaries.more["shown_key"] = made["key"]
    connection_id = user.connection_id(mode)
    good, wrong = user.provider_id(canaries.provider_key), user.provider_id(canaries.wrong_provider_key)

    # what goes well, with one row that the provider refuses
    table_id = user.table(mode, connection_id, good, "rows")
    assert user.build(table_id) == "completed"
    found = user.query(table_id, canaries.query, expect=200)
    assert canaries.row in found["results"][0]["embedded_text"], "the canary is in the store"
    assert user.send("GET", f"/v1/vector-tables/{table_id}/failed-rows", expect=200)["data"][0]["key"] == "bad"
    # what the provider refuses
    user.query(table_id, f"{REFUSED} {canaries.query}", expect=422)
    assert user.build(user.table(mode, connection_id, wrong, "rows")) == "failed"
    assert user.build(user.table(mode, connection_id, good, "uncommon")) == "failed"
    user.send("POST", f"/v1/embedding-providers/{wrong}/test", expect=200)
    credentials = {"api_key": canaries.wrong_provider_key, "base_url": provider.base_url}
    user.send("PUT", f"/v1/embedding-providers/{good}", {"credentials": credentials}, expect=200)
    user.query(table_id, canaries.query, expect=502)
    # what the source refuses, in words that quote a row or a password
    assert user.build(user.table(mode, connection_id, good, "quoting")) == "failed"
    user.send("GET", f"/v1/connections/{connection_id}/tables", expect=200)
    lost = {**tenant.credentials, "user": "nobody-of-that-name"}
    body = {"name": unique("c"), "mode": mode, "credentials": lost}
    assert user.send("POST", "/v1/providers/postgresql/connections", body, expect=201)["status"] == "failed"
    # what the API refuses
    for path, faulty in (
        ("/v1/embedding-providers", {"provider": canaries.provider_key, "credentials": canaries.provider_key}),
        ("/v1/providers/postgresql/connections", {"credentials": {"password": [canaries.source_password]}}),
        (f"/v1/vector-tables/{table_id}/query", {"query": [canaries.query]}),
        (f"/v1/vector-tables/{table_id}/query", {"query": "x", "filters": {"category": {"gte": canaries.metadata}}}),
    ):
        user.send("POST", path, faulty, expect=422)
    user.answers.append(client.get("/metrics").text)

    logged = capfd.readouterr()
    assert '"event": "request"' in logged.err.replace('":"', '": "')
    for line in logged.err.splitlines():
        if line.startswith("{"):
            json.loads(line)
    assert canaries.found_in(logged.err + logged.out) == []
    assert canaries.found_in("\n".join(user.log)) == []
    assert [(names, answer) for answer in user.answers if (names := canaries.found_in(answer))] == []
    assert search_database(catalog_url, canaries) == {}


def test_the_search_finds_what_is_there(canaries: Canaries) -> None:
    assert canaries.found_in(f"x{canaries.row}y") == ["row"]
    assert canaries.found_in(canaries.row.encode().hex()) == ["row"]
    assert canaries.found_in(f"x{canaries.row}y", but=canaries.contents) == []


def test_log_lines_carry_ids(tenant: Tenant, capfd: pytest.CaptureFixture[str]) -> None:
    table = tenant.table()
    task_id = tenant.post(f"/v1/vector-tables/{table['id']}/backfill").json()["task_id"]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    queued = next(line for line in lines if line["event"] == "task queued")
    assert (queued["task_id"], queued["vector_table_id"]) == (task_id, table["id"])
    request = next(line for line in lines if line.get("operation") == "start_backfill")
    assert request["request_id"] == queued["request_id"]
    assert request["key"] == tenant.key[:12]
