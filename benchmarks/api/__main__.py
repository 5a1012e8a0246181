"""`make bench-api`: what the API adds to a query, how soon it acknowledges, how soon it is up, and ten thousand tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median
from typing import Any

from benchmarks.api import acknowledgement, many, queries
from benchmarks.api.process import running_api
from benchmarks.results import RESULTS, earlier, record, spread
from benchmarks.servers import ROOT, Servers, open_servers
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key

PARTS = ("queries", "acknowledgement", "start", "many")
_IMPORTS = """
import sys
from api.app import create_app
from embedd_dagster.settings import Settings
create_app(Settings(database_url='postgresql://x', encryption_keys=sys.argv[1], qdrant_url='http://x'))
print('dagster' in sys.modules)
"""


def measure_start(servers: Servers, times: int) -> dict[str, Any]:
    """From the start of the process to the first 200 of /health, and whether Dagster is in it."""
    upgrade(servers.database_url)
    key = new_encryption_key()
    environment = {
        "EMBEDD_DATABASE_URL": servers.database_url,
        "EMBEDD_ENCRYPTION_KEYS": key,
        "EMBEDD_QDRANT_URL": servers.qdrant_url,
    }
    seconds, cpu_seconds = [], []
    for _ in range(times):
        with running_api(environment) as api:
            seconds.append(api.start_seconds)
            cpu_seconds.append(api.cpu_seconds())
    told = subprocess.run(
        [sys.executable, "-c", _IMPORTS, key], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "imports_dagster": told == "True"}
    print(found, flush=True)
    return found


def start_body(found: dict[str, Any]) -> str:
    """The result, as Markdown."""
    return (
        f"### Start\n\nFrom the start of the process to the first 200 of `/health`: **{spread(found['seconds'], 2)} s**"
        f" ({len(found['seconds'])} times), {median(found['cpu_seconds']):.2f} s of CPU. Target: below 2 s. Dagster is"
        f" {'' if found['imports_dagster'] else 'not '}imported in it."
    )


def main() -> None:
    """Everything, or what the options say; what is not measured again stays as it was recorded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api", description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=6, help="of each load")
    parser.add_argument("--backfills", type=int, default=50)
    parser.add_argument("--qdrant-url", help="a Qdrant of yours instead of the embedded engine")
    options = parser.parse_args()
    wanted = list(options.only)
    if "queries" in wanted and not queries.is_wrk_there():
        print("wrk is not installed (Debian: apt-get install wrk): queries are NOT measured.", file=sys.stderr)
        wanted.remove("queries")
    found: dict[str, Any] = dict(earlier("api") or {})
    with open_servers(options.qdrant_url) as servers:
        if "start" in wanted:
            found["start"] = measure_start(servers, 5)
        if "many" in wanted:
            found["many"] = many.measure(servers)
        if "queries" in wanted:
            found["queries"] = {"rows": options.rows, "lines": queries.measure(servers, options.rows, options.seconds)}
    if "acknowledgement" in wanted:
        found["acknowledgement"] = acknowledgement.measure(options.backfills)
    parts = []
    if "queries" in found:
        parts.append(queries.body(found["queries"]["lines"], found["queries"]["rows"]))
    if "acknowledgement" in found:
        parts.append(acknowledgement.body(found["acknowledgement"]))
    if "start" in found:
        parts.append(start_body(found["start"]))
    if "many" in found:
        parts.append(many.body(found["many"]))
    RESULTS.mkdir(exist_ok=True)
    record("api", "The API", "\n\n".join(parts), found, "make bench-api")


if __name__ == "__main__":
    main()
