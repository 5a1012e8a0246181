"""A user of the running stack: their database, and the calls they make over REST."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import httpx
import psutil
import psycopg
from sqlalchemy import URL

from embedd_dagster.stack.stack import Stack
from tests.support.openai_server import RunningServer

DIMENSIONS = 64
API_KEY = "sk-loopback"
COLUMNS = [
    {"name": "title", "role": "embedding", "ordinal": 1, "name_prefix": "title: "},
    {"name": "body", "role": "embedding", "ordinal": 2},
    {"name": "category", "role": "metadata", "filter_type": "keyword"},
    {"name": "price", "role": "metadata", "filter_type": "float"},
]


class Embedd:
    """One customer: a database of their own next to the stack's, one connection per mode, one provider."""

    def __init__(self, stack: Stack, api: httpx.Client, provider: RunningServer, database: URL) -> None:
        self.stack = stack
        self.api = api
        self.provider_server = provider
        self.database_url = database.render_as_string(hide_password=False)
        self._suffix = database.database
        self._created: list[str] = []
        self.credentials = {
            "host": database.host,
            "port": database.port,
            "database": database.database,
            "user": database.username,
            "password": database.password,
        }
        self.connection_ids = {
            mode: self.post(
                "/v1/providers/postgresql/connections",
                {"name": f"{mode}-{self._suffix}", "mode": mode, "credentials": self.credentials},
            )["id"]
            for mode in ("managed", "platform")
        }
        self.provider_id = self.post(
            "/v1/embedding-providers",
            {
                "name": f"provider-{self._suffix}",
                "provider": "openai",
                "credentials": {"api_key": API_KEY, "base_url": provider.base_url},
                # two batches at once: so that a slow provider makes a backfill that can be caught in the middle
                "limits": {"concurrency": 2},
            },
        )["id"]

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Runs a statement in the customer's database; its rows, if it has any."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters or None)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def create_source(self, row_count: int, table: str = "products") -> None:
        """A table of so many products."""
        self.sql(
            f"""CREATE TABLE {table} (id integer PRIMARY KEY, title text, body text, category text, price numeric(10,2));
            INSERT INTO {table} SELECT n, 'product ' || n, 'the body of product ' || n,
                (ARRAY['red', 'green', 'blue'])[n % 3 + 1], n / 10.0 FROM generate_series(1, {row_count}) n"""
        )

    def create_vector_table(self, mode: str = "managed", table: str = "products", **changes: Any) -> str:
        """The id of a new vector table over the products."""
        body = {
            "name": f"{table}-{mode}-{time.monotonic_ns()}",
            "connection_id": self.connection_ids[mode],
            "embedding_provider_id": self.provider_id,
            "source_table": table,
            "primary_key_column": "id",
            "columns": COLUMNS,
            "embedding_model": "text-embedding-3-small",
            "embedding_dimensions": DIMENSIONS,
            "mode": mode,
            **changes,
        }
        vector_table_id: str = self.post("/v1/vector-tables", body)["id"]
        self._created.append(vector_table_id)
        return vector_table_id

    def post(self, path: str, body: Any = None, *, expect: int | None = None) -> dict[str, Any]:
        """The body of a good answer (or of the status expected)."""
        response = self.api.post(path, json=body) if body is not None else self.api.post(path)
        if expect is None:
            assert response.is_success, response.text
        else:
            assert response.status_code == expect, response.text
        found: dict[str, Any] = response.json() if response.content else {}
        return found

    def get(self, path: str) -> dict[str, Any]:
        """The body of a good answer."""
        response = self.api.get(path)
        assert response.is_success, response.text
        found: dict[str, Any] = response.json()
        return found

    def table(self, vector_table_id: str) -> dict[str, Any]:
        """The vector table as it is now."""
        return self.get(f"/v1/vector-tables/{vector_table_id}")

    def task(self, task_id: str) -> dict[str, Any]:
        """The task as it is now."""
        return self.get(f"/v1/tasks/{task_id}")

    def backfill(self, vector_table_id: str) -> str:
        """Starts a backfill; the id of its task."""
        task_id: str = self.post(f"/v1/vector-tables/{vector_table_id}/backfill")["task_id"]
        return task_id

    def wait_for_task(self, task_id: str, *, within: float = 300.0) -> dict[str, Any]:
        """The task once it has ended, however."""
        deadline = time.monotonic() + within
        while True:
            with suppress(httpx.TransportError):
                task = self.task(task_id)
                if task["status"] in {"completed", "failed", "cancelled"}:
                    return task
            assert time.monotonic() < deadline, f"still {task['status']} after {within} s: {task}"
            time.sleep(0.2)

    def build(self, vector_table_id: str) -> dict[str, Any]:
        """A completed backfill's task."""
        task = self.wait_for_task(self.backfill(vector_table_id))
        assert task["status"] == "completed", task
        return task

    def query(self, vector_table_id: str, text: str, **options: Any) -> list[dict[str, Any]]:
        """The results of a query."""
        answer = self.post(f"/v1/vector-tables/{vector_table_id}/query", {"query": text, **options})
        results: list[dict[str, Any]] = answer["results"]
        return results

    def qdrant(self, method: str, path: str, body: Any = None) -> Any:
        """What Qdrant itself answers."""
        endpoints = self.stack.endpoints
        headers = {"api-key": endpoints.qdrant_api_key}
        response = httpx.request(method, f"{endpoints.qdrant}{path}", json=body, headers=headers, trust_env=False)
        return response.raise_for_status().json()["result"]

    def graphql(self, query: str, **variables: Any) -> dict[str, Any]:
        """What Dagster's webserver answers."""
        response = httpx.post(
            f"{self.stack.endpoints.dagster}/graphql",
            json={"query": query, "variables": variables},
            headers={"Authorization": f"Bearer {self.stack.endpoints.dagster_token}"},
            timeout=30,
        )
        response.raise_for_status()
        body: dict[str, Any] = response.json()
        assert "errors" not in body, body
        data: dict[str, Any] = body["data"]
        return data

    def run_status(self, run_id: str) -> str:
        """The status of a Dagster run."""
        query = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        status: str = self.graphql(query, id=run_id)["runOrError"]["status"]
        return status

    def close(self) -> None:
        """Deletes what the customer made in the stack."""
        for vector_table_id in self._created:
            with suppress(httpx.TransportError):
                self.api.delete(f"/v1/vector-tables/{vector_table_id}")


def worker_of(run_id: str) -> psutil.Process:
    """The process that executes a run: the parent of those that Dagster starts to keep the run's output."""
    for process in psutil.process_iter(["cmdline"]):
        if run_id in " ".join(process.info["cmdline"] or []):
            parent = process.parent()
            assert parent is not None
            return process if "execute_run" in " ".join(process.info["cmdline"]) else parent
    raise AssertionError(f"no worker process of run {run_id}")
