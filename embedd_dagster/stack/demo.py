"""`embedd demo`: the whole product once, over its public REST API, on real data, without a key or a network."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import make_url

from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.errors import EmbeddError, PermanentError
from embedd_dagster.stack import stdlib_docs
from embedd_dagster.stack.control import Endpoints, discard, down
from embedd_dagster.stack.postgres import create_database
from embedd_dagster.stack.stack import StackSettings, running_stack

CUSTOMER_DATABASE: Final = "customer"
# However long it takes: the demo gives up only when nothing has moved for so long.
_STALLED_AFTER_SECONDS = 300.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask, and what must be among the first three answers (None: any that the filter allows)."""

    text: str
    filters: dict[str, Any]
    expected: str | None = None


QUESTIONS: Final = (
    Question("copy a whole directory tree", {}, expected="shutil.copytree"),
    Question("compress bytes", {"kind": "function", "module": {"in": ["gzip", "zlib", "bz2", "lzma"]}}),
    Question("wait until something is done", {"is_coroutine": True, "parameter_count": {"lte": 2}}),
)


class DemoFailed(PermanentError):
    """The demo did not show what it is to show; its state is kept, and the message says where."""


def run_demo(console: Console, modules: Iterable[str] | None = None) -> None:
    """Sets up, embeds and asks, in managed and in platform mode; leaves nothing running, and nothing behind if it succeeds.

    The data is the documentation of these modules, or of the whole standard library.

    Raises:
        DemoFailed: The stack did not start, or an answer is not as it must be. State and logs are kept.
        KeyboardInterrupt: SIGINT or SIGTERM asked for the end.
    """
    begun = time.monotonic()
    # not `.embedd`: a stack that the user keeps running is not disturbed
    state_dir = Path(tempfile.mkdtemp(prefix="embedd-demo-"))
    settings = StackSettings(
        extra_env={"EMBEDD_RATE_LIMIT_PER_MINUTE": "0"},  # the demo polls faster than the default limit allows
        tell=lambda step: console.print(f"   {step}"),
    )
    try:
        with _interruptible(), running_stack_told(console, state_dir, settings) as endpoints:
            _walk_through(console, endpoints, modules)
    except KeyboardInterrupt:
        discard(state_dir)
        console.print("Stopped. Nothing is left.")
        raise
    except Exception as error:
        message, resolution = _explain(error)
        down(state_dir)
        raise DemoFailed(
            message,
            resolution=f"{resolution} The demo's state is kept in {state_dir}, the logs in {state_dir / 'logs'}. "
            f"To remove it: embedd down --remove-state --state-dir {state_dir}",
        ) from error
    discard(state_dir)
    console.print(
        _styled("Done", "bold green", f" in {time.monotonic() - begun:.0f} s; everything is shut down again.")
    )


@contextmanager
def running_stack_told(console: Console, state_dir: Path, settings: StackSettings) -> Iterator[Endpoints]:
    """As `running_stack`, with a word about each step."""
    text = " Starting PostgreSQL, Qdrant's engine, Dagster and the API on free loopback ports …"
    console.print(_styled("1.", "bold", text))
    with running_stack(state_dir, settings=settings) as endpoints:
        console.print(f"   API {endpoints.api}/docs · Dagster {endpoints.dagster_login}", soft_wrap=True)
        yield endpoints
        console.print("Stopping …")


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM says so at once, then raises KeyboardInterrupt; later ones do not disturb the clean-up."""

    def interrupt(_number: int, _frame: object) -> None:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        os.write(
            sys.stderr.fileno(), "\nStopping …\n".encode()
        )  # not by the console, which may be in the midst of a line
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python hears signals in the main thread alone
        yield
        return
    previous: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _explain(error: Exception) -> tuple[str, str]:
    if isinstance(error, EmbeddError):
        return error.message, error.resolution
    return f"{type(error).__name__}: {error}", "This is a fault of the demo, or of the stack it started."


def _styled(first: str, style: str, rest: str) -> Text:
    return Text.assemble((first, style), rest)


def _walk_through(console: Console, endpoints: Endpoints, modules: Iterable[str] | None) -> None:
    customer_url = make_url(endpoints.database_url).set(database=CUSTOMER_DATABASE)
    create_database(endpoints.database_url, CUSTOMER_DATABASE)
    rows = stdlib_docs.load(customer_url.render_as_string(hide_password=False), modules)
    text = f" A customer's table {stdlib_docs.TABLE}: {rows} rows of Python's documentation."
    console.print(_styled("2.", "bold", text))
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
            console.print(_styled(f"{number}.", "bold", f" {mode} mode: the vectors go to {where}."))
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
    columns = (
        TextColumn("   {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    stalled = StallClock(_STALLED_AFTER_SECONDS)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("backfill", total=started["total_rows"] or None)
        while True:
            task = _get(client, f"/v1/tasks/{started['task_id']}")
            done, total = task["progress"]["rows_processed"], task["progress"]["total_rows"]
            progress.update(bar, completed=done, total=total or None)
            if task["status"] == "completed":
                return
            if task["status"] in {"failed", "cancelled"}:
                raise DemoFailed(f"The backfill {task['status']}: {task['last_error']}")
            if stalled.has_run_out((task["status"], task["progress"], task["attempts"], task["dagster_run_id"])):
                raise DemoFailed(
                    f"The backfill has not moved for {_STALLED_AFTER_SECONDS:.0f} s: it is {task['status']} after "
                    f"{done} of {total} rows."
                )
            time.sleep(_POLL_SECONDS)


class StallClock:
    """Detects that an observed value has not changed for too long."""

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._last: object = object()
        self._since = clock()

    def has_run_out(self, seen: object) -> bool:
        """Whether the value has been the same for the whole limit."""
        if seen != self._last:
            self._last, self._since = seen, self._clock()
        return self._clock() - self._since >= self._limit_seconds


def _ask(console: Console, client: httpx.Client, vector_table_id: str, question: Question) -> None:
    answer = _post(
        client,
        f"/v1/vector-tables/{vector_table_id}/query",
        {"query": question.text, "limit": 3, **({"filters": question.filters} if question.filters else {})},
    )
    shown = Table(
        title=Text(f"“{question.text}”" + (f"  {question.filters}" if question.filters else "")), title_justify="left"
    )
    for heading in ("similarity", "qualified_name", "what it says"):
        shown.add_column(heading, overflow="fold", no_wrap=heading != "what it says")
    for result in answer["results"]:
        summary = result["embedded_text"].partition("\n")[2].strip().partition("\n")[0]
        shown.add_row(f"{result['similarity_score']:.3f}", Text(str(result["id"])), Text(summary[:80]))
    console.print(shown, soft_wrap=False)
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
        raise EmbeddError(
            f"{response.request.url.path}: {error.get('message')} (request {error.get('request_id')}, see api.log)",
            resolution=error.get("resolution"),
        )
    return body
