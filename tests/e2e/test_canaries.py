"""The real stack, run with canaries: none is found in Dagster's database, logs and files, the catalog or the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from embedd_dagster.stack.stack import Stack
from tests.support.canaries import Canaries, search_database, search_files
from tests.support.e2e import Embedd
from tests.support.echoing_provider import REFUSED, EchoingProvider, running_echoing_provider

pytestmark = pytest.mark.e2e

# what is kept for the customer: vectors with their texts, and in our PostgreSQL's files the customer's own database
_STORES = ("qdrant", "postgres")


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def gossip(canaries: Canaries) -> Iterator[EchoingProvider]:
    with running_echoing_provider(canaries.provider_key) as running:
        yield running


def test_no_canary_gets_out(
    embedd: Embedd, stack: Stack, canaries: Canaries, gossip: EchoingProvider, eventually: Callable[..., Any]
) -> None:
    role = f"role_{uuid4().hex[:8]}"
    embedd.sql("CREATE EXTENSION IF NOT EXISTS vector")
    with psycopg.connect(embedd.database_url, autocommit=True) as connection:
        connection.execute(
            sql.SQL(
                """CREATE ROLE {role} LOGIN PASSWORD {password};
                CREATE SCHEMA {role} AUTHORIZATION {role};
                CREATE TABLE {role}.rows (id integer PRIMARY KEY, title text, category text);
                INSERT INTO {role}.rows SELECT n, 'row ' || n || ' ' || {row}, {metadata} FROM generate_series(1, 60) n;
                INSERT INTO {role}.rows VALUES (61, {refused} || {row}, {metadata});
                CREATE VIEW {role}.quoting AS SELECT id, category, (title::integer)::text AS title FROM {role}.rows;
                GRANT SELECT ON ALL TABLES IN SCHEMA {role} TO {role};"""
            ).format(
                role=sql.Identifier(role),
                password=sql.Literal(canaries.source_password),
                row=sql.Literal(canaries.row),
                metadata=sql.Literal(canaries.metadata),
                refused=sql.Literal(REFUSED),
            )
        )
    customer = {**embedd.credentials, "user": role, "password": canaries.source_password}
    token = httpx.Headers(embedd.api.headers)["authorization"].removeprefix("Bearer ")
    made = embedd.post("/v1/api-keys", {"name": "k"})
    encryption_keys = (stack.state_dir / "encryption_keys").read_text().strip()
    canaries.more.update({"api_key": token, "shown_key": made["key"]})
    canaries.more.update({f"encryption_key_{n}": key for n, key in enumerate(encryption_keys.split(","))})
    answers: list[str] = []

    def post(path: str, body: Any = None) -> dict[str, Any]:
        found = embedd.post(path, body)
        answers.append(json.dumps(found))
        return found

    def provider_id(key: str) -> str:
        credentials = {"api_key": key, "base_url": gossip.base_url}
        return post("/v1/embedding-providers", {"name": uuid4().hex, "provider": "openai", "credentials": credentials})[
            "id"
        ]

    def table_id(mode: str, provider: str, source_table: str) -> str:
        connection_body = {"name": uuid4().hex, "mode": mode, "credentials": customer}
        body = {
            "name": uuid4().hex, "connection_id": post("/v1/providers/postgresql/connections", connection_body)["id"],
            "embedding_provider_id": provider, "source_table": f"{role}.{source_table}", "primary_key_column": "id",
            "columns": [
                {"name": "title", "role": "embedding"},
                {"name": "category", "role": "metadata", "filter_type": "keyword"},
            ],
            "embedding_model": "mine", "embedding_dimensions": 16, "mode": mode,
        }  # fmt: skip
        return post("/v1/vector-tables", body)["id"]

    good, wrong = provider_id(canaries.provider_key), provider_id(canaries.wrong_provider_key)
    expected = {
        table_id("managed", good, "rows"): "completed",
        table_id("platform", good, "rows"): "completed",
        table_id("managed", wrong, "rows"): "failed",
        table_id("managed", good, "quoting"): "failed",
    }
    tasks = {vector_table_id: embedd.backfill(vector_table_id) for vector_table_id in expected}
    for vector_table_id, status in expected.items():
        task = embedd.wait_for_task(tasks[vector_table_id])
        assert task["status"] == status, task
        run_id = task["dagster_run_id"]
        eventually(lambda run_id=run_id: embedd.run_status(run_id) in {"SUCCESS", "FAILURE"})
        for path in ("", "/sync/status", "/failed-rows"):
            answers.append(embedd.api.get(f"/v1/vector-tables/{vector_table_id}{path}").text)
        answers.append(json.dumps(task))
        answers.append(json.dumps(_events(embedd, run_id)))
        if status == "completed":
            hits = embedd.query(vector_table_id, canaries.query, limit=3)
            assert canaries.row in hits[0]["embedded_text"], "the canary is in the store"
            embedd.post(
                f"/v1/vector-tables/{vector_table_id}/query", {"query": f"{REFUSED}{canaries.query}"}, expect=422
            )

    assert [names for answer in answers if (names := canaries.found_in(answer))] == []
    catalog = make_url(stack.endpoints.database_url)
    assert search_database(catalog.render_as_string(hide_password=False), canaries) == {}
    dagster = catalog.set(database="dagster").render_as_string(hide_password=False)
    assert _count(dagster, "event_logs") > 0
    assert search_database(dagster, canaries) == {}
    assert search_files(stack.state_dir, canaries, skip=(*_STORES, "encryption_keys")) == {}


def _events(embedd: Embedd, run_id: str) -> dict[str, Any]:
    return embedd.graphql(
        """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
            ... on MessageEvent { message }
            ... on MaterializationEvent { metadataEntries { label ... on TextMetadataEntry { text }
                ... on MarkdownMetadataEntry { mdStr } ... on JsonMetadataEntry { jsonString } } }
            ... on ErrorEvent { error { message stack } } } } }
            runOrError(runId: $id) { ... on Run { runConfigYaml tags { key value } } } }""",
        id=run_id,
    )


def _count(url: str, table: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchone()
        assert row is not None
        return int(row[0])
