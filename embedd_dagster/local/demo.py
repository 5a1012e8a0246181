"""`embedd demo`: the whole product once, over its public REST API, on real data, without a key or a network."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import make_url

from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.errors import EmbeddError, PermanentError
from embedd_dagster.local import stdlib_docs
from embedd_dagster.local.outside import Endpoints, discard
from embedd_dagster.local.postgres import create_database
from embedd_dagster.local.stack import StackSettings, running_stack

CUSTOMER_DATABASE: Final = "customer"
_BACKFILL_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask, and what must be among the first three answers (None: whatever the filter allows)."""

    text: str
    filters: dict[str, Any]
    expected: str | None = None


QUESTIONS: Final = (
    Question("copy a whole directory tree", {}, expected="shutil.copytree"),
    Question("compress bytes", {"kind": "function", "module": {"in": ["gzip", "zlib", "bz2", "lzma"]}}),
    Question("wait until something is done", {"is_coroutine": True, "parameter_count": {"lte": 2}}),
)


class DemoFailed(PermanentError):
    """The demo did not show what it is to show."""


def run_demo(console: Console) -> None:
    """Sets up, embeds and asks, in managed and in platform mode; leaves nothing running and nothing behind.

    Raises DemoFailed where an answer is not as it must be, and what the stack raises where it cannot be started.
    """
    begun = time.monotonic()
    # not `.embedd`: a stack that the user keeps running is not disturbed
    state_dir = Path(tempfile.mkdtemp(prefix="embedd-demo-"))
    # the demo polls faster than the default limit allows
    settings = StackSettings(extra_env={"EMBEDD_RATE_LIMIT_PER_MINUTE": "0"})
    try:
        console.print("[bold]1.[/] Starting PostgreSQL, Qdrant's engine, Dagster and the API on free loopback ports …")
        with running_stack(state_dir, settings=settings) as endpoints:
            console.print(f"   API {endpoints.api}/docs · Dagster {endpoints.dagster_login}", soft_wrap=True)
            _walk_through(console, endpoints)
    finally:
        discard(state_dir)
    console.print(f"[bold green]Done[/] in {time.monotonic() - begun:.0f} s; everything is shut down again.")


def _walk_through(console: Console, endpoints: Endpoints) -> None:
    customer_url = make_url(endpoints.database_url).set(database=CUSTOMER_DATABASE)
    create_database(endpoints.database_url, CUSTOMER_DATABASE)
    rows = stdlib_docs.load(customer_url.render_as_string(hide_password=False))
    console.print(
        f"[bold]2.[/] A customer's table [cyan]{stdlib_docs.TABLE}[/]: {rows} rows of Python's documentation."
    )
    credentials = {
        "host": customer_url.host,
        "port": customer_url.port,
        "database": CUSTOMER_DATABASE,
        "user": customer_url.username,
        "password": customer_url.password,
    }
    with _client(endpoints) as client:
        provider = _post(
            client, "/v1/embedding-providers", {"name": "in-process", "provider": "local", "credentials": {}}
        )
        for number, (mode, where) in enumerate((("managed", "Qdrant"), ("platform", "pgvector")), start=3):
            console.print(f"[bold]{number}.[/] [cyan]{mode}[/] mode: the vectors go to {where}.")
            table = _create_vector_table(client, credentials, provider["id"], mode)
            _backfill(console, client, table["id"])
            for question in QUESTIONS:
                _ask(console, client, table["id"], question)


@contextmanager
def _client(endpoints: Endpoints) -> Iterator[httpx.Client]:
    catalog = Catalog(endpoints.database_url)
    try:
        with catalog.transaction() as session:
            environment = environments.ensure_defaults(session)
            key = api_keys.create(session, environment.org_id, None, "demo", Permission.FULL)
    finally:
        catalog.close()
    headers = {"Authorization": f"Bearer {key.raw}"}
    with httpx.Client(base_url=endpoints.api, headers=headers, timeout=60, trust_env=False) as client:
        yield client


def _create_vector_table(
    client: httpx.Client, credentials: dict[str, Any], provider_id: str, mode: str
) -> dict[str, Any]:
    connection = _post(
        client,
        "/v1/providers/postgresql/connections",
        {"name": f"customer-{mode}", "mode": mode, "credentials": credentials},
    )
    return _post(
        client,
        "/v1/vector-tables",
        {
            "name": f"python-docs-{mode}",
            "connection_id": connection["id"],
            "embedding_provider_id": provider_id,
            "source_table": stdlib_docs.TABLE,
            "primary_key_column": "qualified_name",
            "columns": [
                {"name": "qualified_name", "role": "embedding", "ordinal": 1},
                {"name": "docstring", "role": "embedding", "ordinal": 2},
                {"name": "module", "role": "metadata", "filter_type": "keyword"},
                {"name": "kind", "role": "metadata", "filter_type": "keyword"},
                {"name": "parameter_count", "role": "metadata", "filter_type": "integer"},
                {"name": "is_coroutine", "role": "metadata", "filter_type": "boolean"},
            ],
            "embedding_model": "all-MiniLM-L6-v2",
            "embedding_dimensions": 384,
            "mode": mode,
        },
    )


def _backfill(console: Console, client: httpx.Client, vector_table_id: str) -> None:
    started = _post(client, f"/v1/vector-tables/{vector_table_id}/backfill", None)
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("backfill", total=started["total_rows"] or None)
        deadline = time.monotonic() + _BACKFILL_PATIENCE_SECONDS
        while time.monotonic() < deadline:
            task = _get(client, f"/v1/tasks/{started['task_id']}")
            done, total = task["progress"]["rows_processed"], task["progress"]["total_rows"]
            progress.update(bar, completed=done, total=total or None)
            if task["status"] == "completed":
                return
            if task["status"] in {"failed", "cancelled"}:
                raise DemoFailed(f"The backfill {task['status']}: {task['last_error']}")
            time.sleep(_POLL_SECONDS)
    raise DemoFailed(f"The backfill did not end within {_BACKFILL_PATIENCE_SECONDS:.0f} s.")


def _ask(console: Console, client: httpx.Client, vector_table_id: str, question: Question) -> None:
    answer = _post(
        client,
        f"/v1/vector-tables/{vector_table_id}/query",
        {"query": question.text, "limit": 3, **({"filters": question.filters} if question.filters else {})},
    )
    shown = Table(
        title=f"“{question.text}”" + (f"  {question.filters}" if question.filters else ""), title_justify="left"
    )
    for heading in ("similarity", "qualified_name", "what it says"):
        shown.add_column(heading, overflow="fold", no_wrap=heading != "what it says")
    for result in answer["results"]:
        summary = result["embedded_text"].partition("\n")[2].strip().partition("\n")[0]
        shown.add_row(f"{result['similarity_score']:.3f}", str(result["id"]), summary[:80])
    console.print(shown)
    found = [result["id"] for result in answer["results"]]
    if not found:
        raise DemoFailed(f"{question.text!r} found nothing.")
    if question.expected is not None and question.expected not in found:
        raise DemoFailed(f"{question.text!r} must find {question.expected} among the first three, found {found}.")


def _post(client: httpx.Client, path: str, body: Any) -> dict[str, Any]:
    return _checked(client.post(path, json=body) if body is not None else client.post(path))


def _get(client: httpx.Client, path: str) -> dict[str, Any]:
    return _checked(client.get(path))


def _checked(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    if response.is_error:
        error = body.get("error", {})
        raise EmbeddError(f"{response.request.url.path}: {error.get('message')}", resolution=error.get("resolution"))
    return body
