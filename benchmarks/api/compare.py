"""`python -m benchmarks.api.compare CHECKOUT`: queries through this API and through that of another checkout, in turn.

Both processes use the same catalog, store and provider. They get the load one after the other, several times, so that other
work on the machine disturbs both alike. Takes two minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import data
from benchmarks.api.process import running_api
from benchmarks.api.queries import DIMENSIONS, make_read_only_key, send_queries
from benchmarks.ours import Bench
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers, open_servers
from embedd_dagster.core.vector_table import Mode

CLIENTS = (1, 8)
SIDES = ("before", "after")
ROWS = 2_000


def measure(servers: Servers, before: Path, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """One result per round, number of clients and checkout."""
    servers.provider.behave(latency_seconds=0)
    data.create_table(servers.database_url, ROWS)
    bench = Bench(servers, Mode.PLATFORM, DIMENSIONS)
    bench.run()
    key = make_read_only_key(bench)
    environment = bench.environment()
    results = []
    with (
        running_api(environment, checkout=before, package="api", rate_limit_per_minute=10**6) as old,
        running_api(environment, checkout=ROOT, package="api", rate_limit_per_minute=10**6) as new,
    ):
        for api in (old, new):
            send_queries(api, key, bench.vector_table_id, clients=8, seconds=8)
        for number in range(rounds):
            for clients in CLIENTS:
                both = [("before", old), ("after", new)]
                for which, api in both if number % 2 else reversed(both):
                    found = send_queries(api, key, bench.vector_table_id, clients, seconds)
                    results.append({"round": number, "clients": clients, "which": which, **found})
                    print(which, clients, f"{found['rate']:.0f}/s", found["latency"], flush=True)
    bench.close()
    return results


def _figures(result: dict[str, Any]) -> list[float]:
    latency, overheads = result["latency"], result["overheads"]
    return [result["rate"], latency["p50"], latency["p95"], overheads["p50"], overheads["p95"], result["cpu_ms"]]


def body(results: list[dict[str, Any]]) -> str:
    """The result, as Markdown: medians over the rounds."""
    lines: list[list[object]] = []
    for clients in CLIENTS:
        figures = {
            which: [_figures(r) for r in results if (r["clients"], r["which"]) == (clients, which)] for which in SIDES
        }
        for which in SIDES:
            rate, *others = map(median, zip(*figures[which], strict=True))
            lines.append([clients, which, f"{rate:,.0f}", *(f"{value:.2f}" for value in others)])
        # of each round's own pair, as the machine is faster in one minute than in the next
        pairs = zip(*(figures[which] for which in SIDES), strict=True)
        ratios = [[new / old for old, new in zip(*pair, strict=True)] for pair in pairs]
        rate, *others = map(median, zip(*ratios, strict=True))
        lines.append([clients, "**after / before**", f"**{rate:.2f}**", *(f"{value:.2f}" for value in others)])
    columns = [
        "clients", "", "queries/s", "seen by the client, p50 ms", "p95 ms", "added by the API, p50 ms", "p95 ms",
        "CPU of the API per query, ms",
    ]  # fmt: skip
    return (
        f"{ROWS:,} vectors × {DIMENSIONS} in pgvector, both API processes over the same catalog, store and provider, with the"
        f" rate limit counted, asked in turn. Medians of {1 + max(r['round'] for r in results)} rounds.\n\n"
        + table(columns, lines)
    )


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api.compare", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    options = parser.parse_args()
    with open_servers("http://127.0.0.1:1") as servers:  # no Qdrant: the vectors are in pgvector
        results = measure(servers, options.checkout.resolve(), options.rounds, options.seconds)
    record("api_before_after", "The API, before and after", body(results), results, "python -m benchmarks.api.compare")


if __name__ == "__main__":
    main()
