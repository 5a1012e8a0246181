"""Queries of 100,000 vectors in both modes: what the API adds to the embedding call and the search, and how many a second.

The load comes from `wrk`, as a generator in Python would take the processors that it measures. What the API adds is read
from each answer's `Server-Timing`: total - embed - search, measured in the server from the request's arrival to the first
byte of its answer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.api.process import ApiProcess, running_api
from benchmarks.ours import Bench
from benchmarks.results import table
from benchmarks.servers import Servers
from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.core.vector_table import Mode

DIMENSIONS = 384
CLIENTS = (1, 8, 32)
MODES = {"pgvector": Mode.PLATFORM, "qdrant": Mode.MANAGED}
FILTER = ', "filters": {"category": "red", "price": {"lt": 80}}'
_SCRIPT = Path(__file__).with_name("query.lua")
_PACED_CLIENTS, _PACED_RATE = 32, 220
_UNLIMITED = 10**6  # a limit that nobody reaches: what counting costs


def is_wrk_there() -> bool:
    """Whether the load generator is installed."""
    return shutil.which("wrk") is not None


def measure(servers: Servers, rows: int, seconds: int) -> list[dict[str, Any]]:
    """Every line of the table."""
    servers.provider.behave(latency_seconds=0)
    data.create_table(servers.database_url, rows)
    benches = {store: Bench(servers, mode, DIMENSIONS) for store, mode in MODES.items()}
    for store, bench in benches.items():
        print(f"{store}: {rows:,} rows in {bench.run().seconds:.0f} s", flush=True)
    first = benches["pgvector"]
    key = make_read_only_key(first)
    sealed_by = ",".join(b.runtime.settings.encryption_keys[0].get_secret_value() for b in benches.values())
    environment = {**first.environment(), "EMBEDD_ENCRYPTION_KEYS": sealed_by}
    results = []
    with running_api(environment, rate_limit_per_minute=0) as api:
        for store, bench in benches.items():
            send_queries(api, key, bench.vector_table_id, clients=8, seconds=3)
            for filtered in (False, True):
                for clients, pace in [*((number, 0) for number in CLIENTS), (_PACED_CLIENTS, _PACED_RATE)]:
                    found = send_queries(
                        api, key, bench.vector_table_id, clients, seconds, filtered=filtered, pace=pace
                    )
                    results.append({"store": store, "filter": filtered, "clients": clients, "pace": pace, **found})
                    print(results[-1], flush=True)
    with running_api(environment, rate_limit_per_minute=_UNLIMITED) as api:
        send_queries(api, key, first.vector_table_id, clients=8, seconds=3)
        found = send_queries(api, key, first.vector_table_id, clients=8, seconds=seconds)
        results.append({"store": "pgvector, rate limit counted", "filter": False, "clients": 8, "pace": 0, **found})
    for bench in benches.values():
        bench.close()
    return results


def make_read_only_key(bench: Bench) -> str:
    """A key for the bench's catalog."""
    with bench.runtime.catalog.transaction() as session:
        organization = environments.ensure_defaults(session).org_id
        return api_keys.create(session, organization, None, "bench", Permission.READ_ONLY).raw


def send_queries(
    api: ApiProcess, key: str, table_id: str, clients: int, seconds: int, *, filtered: bool = False, pace: int = 0
) -> dict[str, Any]:
    """Queries by so many clients for so long: how many a second, and what their answers report."""
    given = {
        "API_KEY": key,
        "TABLE_ID": table_id,
        "FILTER": FILTER if filtered else "",
        "MEAN_DELAY_MS": str(1000 * clients // pace if pace else 0),
    }
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "-s", str(_SCRIPT), api.url]
    before = api.cpu_seconds()
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    used = api.cpu_seconds() - before
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {found['requests']} queries failed: {done.stderr[-500:]}")
    found["rate"] = found["requests"] / found["seconds"]
    found["cpu_ms"] = 1000 * used / found["requests"]
    return found


def body(results: list[dict[str, Any]], rows: int) -> str:
    """The table, as Markdown."""
    columns = [
        "store", "filter", "clients", "queries/s", "**added by the API**, p50 ms", "p95 ms", "of it catalog, p50 ms",
        "embed, p50 ms", "search, p50 ms", "seen by the client, p50 / p95 ms", "CPU of the API a query, ms",
    ]  # fmt: skip
    lines = [
        [
            r["store"], "yes" if r["filter"] else "no", f"{r['clients']}, paced" if r["pace"] else r["clients"],
            f"{r['rate']:,.0f}", f"**{r['overheads']['p50']:.1f}**", f"**{r['overheads']['p95']:.1f}**",
            f"{r['catalogs']['p50']:.1f}", f"{r['embeds']['p50']:.1f}", f"{r['searches']['p50']:.1f}",
            f"{r['latency']['p50']:.1f} / {r['latency']['p95']:.1f}", f"{r['cpu_ms']:.2f}",
        ]
        for r in results
    ]  # fmt: skip
    return (
        f"### Queries\n\n{rows:,} vectors × {DIMENSIONS}, 10 results, one API process; provider, store, catalog and load"
        f" share the same processors. The provider answers at once. Paced: {_PACED_CLIENTS} clients that together ask some"
        f" {_PACED_RATE} times per second; the others ask again as soon as they have their answer, so that from 8 on the"
        " processors are full and most of the time is waiting for one. Target: added at most 5 ms (p50) and 15 ms (p95) at"
        f" 200 queries/s.\n\n{table(columns, lines)}"
    )
