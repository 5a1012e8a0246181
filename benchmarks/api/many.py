"""Ten thousand vector tables against a hundred: the API's answers, and the ticks of the sensor and of the schedule."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import dagster as dg
import httpx
import psycopg
from sqlalchemy import make_url

from benchmarks.api.process import running_api
from benchmarks.results import table
from benchmarks.servers import Servers
from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.reconcile.sensor import reconcile
from embedd_dagster.defs.schedules import schedule_syncs
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import Settings
from tests.support.many_tables import fill_catalog, vector_table_id

SIZES = (100, 10_000)
_REQUESTS = 60
_TICKS = 7


def measure(servers: Servers) -> list[dict[str, Any]]:
    """Milliseconds of each operation, by the number of tables."""
    catalog_url, dagster_url = (_new_database(servers, name) for name in ("many_catalog", "many_dagster"))
    upgrade(catalog_url)
    environment = {
        "EMBEDD_DATABASE_URL": catalog_url,
        "EMBEDD_ENCRYPTION_KEYS": new_encryption_key(),
        "EMBEDD_QDRANT_URL": servers.qdrant_url,
    }
    runtime = Runtime.open(
        Settings(
            database_url=catalog_url,
            encryption_keys=(environment["EMBEDD_ENCRYPTION_KEYS"],),
            qdrant_url=servers.qdrant_url,
        )
    )
    results: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="embedd-bench-dagster-") as home:
        url = make_url(dagster_url).set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
        Path(home, "dagster.yaml").write_text(
            f"storage:\n  postgres:\n    postgres_url: {url}\ntelemetry:\n  enabled: false\n"
        )
        with dg.DagsterInstance.from_config(home) as instance, running_api(environment, rate_limit_per_minute=0) as api:
            with runtime.catalog.transaction() as session:
                organization_id = environments.ensure_defaults(session).org_id
                key = api_keys.create(session, organization_id, None, "bench", Permission.FULL).raw
            with api.client(key) as client:
                body = _table_body(client, servers)
                filled = 0
                for size in SIZES:
                    fill_catalog(catalog_url, filled + 1, size)
                    filled = size
                    results += [{"tables": size, **line} for line in _requests(client, size, body)]
                    results += [{"tables": size, **line} for line in _ticks(instance, runtime, size)]
    runtime.close()
    return results


def _new_database(servers: Servers, name: str) -> str:
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    return make_url(servers.database_url).set(database=name).render_as_string(hide_password=False)


def _table_body(client: httpx.Client, servers: Servers) -> dict[str, Any]:
    """A vector table that can be made: over a real connection, with a real provider."""
    servers.sql("CREATE TABLE IF NOT EXISTS bench_few (id bigint PRIMARY KEY, title text)")
    address = make_url(servers.database_url)
    credentials = {
        "host": address.host, "port": address.port, "database": address.database, "user": address.username,
        "password": address.password,
    }  # fmt: skip
    made = client.post(
        "/v1/providers/postgresql/connections", json={"name": "real", "mode": "managed", "credentials": credentials}
    )
    provider = client.post(
        "/v1/embedding-providers",
        json={
            "name": "real", "provider": "openai",
            "credentials": {"api_key": "sk-bench", "base_url": servers.provider.base_url},
        },
    )  # fmt: skip
    return {
        "connection_id": made.raise_for_status().json()["id"],
        "embedding_provider_id": provider.raise_for_status().json()["id"],
        "source_table": "bench_few", "primary_key_column": "id", "columns": [{"name": "title", "role": "embedding"}],
        "embedding_model": "text-embedding-3-small", "embedding_dimensions": 384, "mode": "managed",
    }  # fmt: skip


def _requests(client: httpx.Client, size: int, body: dict[str, Any]) -> list[dict[str, Any]]:
    cursor = ""
    for _ in range(min(size - 100, 5000) // 100):
        page = client.get(f"/v1/vector-tables?limit=100{cursor}").raise_for_status().json()["pagination"]
        cursor = f"&cursor={page['next_cursor']}"
    asked: dict[str, Callable[[], httpx.Response]] = {
        "GET /v1/vector-tables": lambda: client.get("/v1/vector-tables"),
        "… from the middle of the list": lambda: client.get(f"/v1/vector-tables?limit=20{cursor}"),
        "GET /v1/vector-tables/{id}": lambda: client.get(f"/v1/vector-tables/{vector_table_id(size // 2)}"),
        "GET /v1/tasks": lambda: client.get("/v1/tasks"),
        "POST /v1/vector-tables": lambda: client.post("/v1/vector-tables", json={**body, "name": uuid4().hex}),
    }
    return [_timed(name, lambda ask=ask: ask().raise_for_status(), _REQUESTS) for name, ask in asked.items()]  # type: ignore[misc]


def _ticks(instance: dg.DagsterInstance, runtime: Runtime, size: int) -> list[dict[str, Any]]:
    memory = Memory()

    def tick() -> dg.SensorResult | dg.SkipReason:
        return reconcile(instance, lambda: runtime, memory, lambda _text: None)

    begun = time.perf_counter()
    first = tick()
    seconds = time.perf_counter() - begun
    for change in (isinstance(first, dg.SensorResult) and first.dynamic_partitions_requests) or ():
        if isinstance(change, dg.AddDynamicPartitionsRequest):
            instance.add_dynamic_partitions("vector_tables", change.partition_keys)
    adds = {
        "what": "reconcile, the tick that finds all of them new",
        "p50_ms": 1000 * seconds,
        "p95_ms": 1000 * seconds,
    }
    reconciles = _timed("reconcile", tick, _TICKS)
    schedule_syncs(lambda: runtime, datetime.now(UTC), lambda _text: None)  # those that are due
    schedules = _timed(
        "sync_schedule", lambda: schedule_syncs(lambda: runtime, datetime.now(UTC), lambda _text: None), _TICKS
    )
    return [adds, reconciles, schedules] if size > SIZES[0] else [reconciles, schedules]


def _timed(what: str, call: Callable[[], object], times: int) -> dict[str, Any]:
    call()
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    found = {
        "what": what,
        "p50_ms": 1000 * median(seconds),
        "p95_ms": 1000 * quantiles(seconds, n=20, method="inclusive")[-1],
    }
    print(found, flush=True)
    return found


def body(results: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    small, large = SIZES
    by_key = {(r["what"], r["tables"]): r for r in results}

    def shown(what: str, size: int) -> str:
        found = by_key.get((what, size))
        return f"{found['p50_ms']:.1f} / {found['p95_ms']:.1f}" if found else ""

    names = list(dict.fromkeys(r["what"] for r in results))
    lines = [[name, shown(name, small), shown(name, large)] for name in names]
    return (
        "### Ten thousand vector tables\n\np50 / p95 in ms, one request after the other, by the number of vector tables in"
        " the environment; one in a hundred is not settled. Ticks run over Dagster's PostgreSQL storage with as many dynamic"
        " partitions. Target: flat, and a tick below 2 s.\n\n"
        + table(["", f"{small:,} tables", f"{large:,} tables"], lines)
    )
