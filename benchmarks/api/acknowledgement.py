"""How soon a backfill is acknowledged by the real stack, with Dagster up and with its webserver down."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from sqlalchemy import make_url

from benchmarks.results import table
from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.stack.control import discard
from embedd_dagster.stack.postgres import create_database
from embedd_dagster.stack.stack import Stack, StackSettings
from tests.support.e2e import API_KEY, Embedd
from tests.support.openai_server import running_openai_server

_CUSTOMER = "bench_customer"


def measure(count: int) -> list[dict[str, Any]]:
    """POST …/backfill, one after the other, each of a table of its own; the runs of those before are at work meanwhile."""
    results = []
    with _customer() as customer:
        customer.create_source(10)
        for state in ("up", "webserver stopped"):
            tables = [customer.create_vector_table("managed") for _ in range(count)]
            if state != "up":
                customer.stack.stop_child("dagster-webserver")
            seconds = []
            for vector_table_id in tables:
                begun = time.perf_counter()
                customer.backfill(vector_table_id)
                seconds.append(time.perf_counter() - begun)
            for vector_table_id in tables:
                customer.api.delete(f"/v1/vector-tables/{vector_table_id}")
            p95 = quantiles(seconds, n=20)[-1]
            results.append({"dagster": state, "count": count, "p50_ms": 1000 * median(seconds), "p95_ms": 1000 * p95})
            print(results[-1], flush=True)
    return results


@contextmanager
def _customer() -> Iterator[Embedd]:
    directory = Path(tempfile.mkdtemp(prefix="embedd-bench-stack-"))
    settings = StackSettings(extra_env={"EMBEDD_RATE_LIMIT_PER_MINUTE": "0"})
    try:
        with running_openai_server(api_key=API_KEY) as provider, Stack(directory, settings=settings) as stack:
            url = stack.endpoints.database_url
            create_database(url, _CUSTOMER)
            catalog = Catalog(url)
            with catalog.transaction() as session:
                organization_id = environments.ensure_defaults(session).org_id
                key = api_keys.create(session, organization_id, None, "bench", Permission.FULL).raw
            catalog.close()
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=stack.endpoints.api, headers=headers, timeout=30, trust_env=False) as client:
                yield Embedd(stack, client, provider, make_url(url).set(database=_CUSTOMER))
    finally:
        discard(directory)


def body(results: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    lines = [[r["dagster"], r["count"], f"{r['p50_ms']:.0f}", f"**{r['p95_ms']:.0f}**"] for r in results]
    return (
        "### Backfills\n\nUntil `POST …/backfill` is answered, in the whole stack as `embedd up` starts it; the runs that it"
        " launches take the processors meanwhile. Target: p95 below 100 ms.\n\n"
        + table(["Dagster", "backfills", "p50 ms", "p95 ms"], lines)
    )
