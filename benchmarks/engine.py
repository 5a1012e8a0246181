"""`make bench`: ours against the barest script, then scenarios, scaling, memory, and (with --peers) other people's tools."""

from __future__ import annotations

import argparse
import time

from benchmarks import data, memory, peers, reference, scaling, scenarios
from benchmarks.ours import Bench, without_index
from benchmarks.peers import scenarios as peer_scenarios
from benchmarks.results import earlier, record, spread, table
from benchmarks.servers import Servers, open_servers
from embedd_dagster.core.vector_table import Mode

MODES = {"pgvector": Mode.PLATFORM, "qdrant": Mode.MANAGED}
INDEX_MEMORY_MB = 1024  # at least what ours takes at these sizes


def compare(
    servers: Servers, store: str, rows: int, dimensions: int, latency_ms: int, *, runs: int, indexed: bool
) -> dict[str, object]:
    """The reference and ours in turn, so many times."""
    servers.provider.behave(latency_seconds=latency_ms / 1000)
    reference_rates, our_rates, starts, reference_ready, our_ready = [], [], [], [], []
    for _ in range(runs):
        begun = time.perf_counter()
        if store == "pgvector":
            reference.run_pgvector(servers.database_url, servers.provider.base_url, dimensions)
        else:
            reference.run_qdrant(servers.database_url, servers.provider.base_url, dimensions, servers.qdrant_url)
        seconds = time.perf_counter() - begun
        reference_rates.append(rows / seconds)
        with_index = indexed and store == "pgvector"
        if with_index:
            reference_ready.append(seconds + reference.index_pgvector(servers.database_url, INDEX_MEMORY_MB))
        bench = Bench(servers, MODES[store], dimensions)
        if with_index:
            run = bench.run()
            our_ready.append(run.seconds)
        else:
            with without_index():
                run = bench.run()
        our_rates.append(run.load_rate)
        starts.append(run.start_seconds)
        bench.close()
    result = {
        "store": store, "rows": rows, "dimensions": dimensions, "latency_ms": latency_ms,
        "reference_rows_per_second": reference_rates, "our_rows_per_second": our_rates, "start_seconds": starts,
        "reference_ready_seconds": reference_ready, "our_ready_seconds": our_ready,
    }  # fmt: skip
    print(result, flush=True)
    return result


def _ratios(ours: list[float], reference: list[float]) -> str:
    """Round by round: a shared machine is faster in one minute than in the next, neighbours in time are not so far apart."""
    return f"**{spread([our / its for our, its in zip(ours, reference, strict=True)], 2)}**"


KEYS = ("rows", "dimensions", "latency_ms", "store")


def record_engine(measured: list[dict], command: str) -> None:
    """The tables of what `compare` gave, now or earlier: each line is one run's."""
    by_key = {tuple(item[key] for key in KEYS): item for item in [*earlier("engine"), *measured]}
    results = [by_key[key] for key in sorted(by_key)]
    columns = [
        "store", "rows", "dimensions", "latency", "reference rows/s", "ours rows/s (load)", "ratio", "target",
        "start of our run, s",
    ]  # fmt: skip
    lines = [
        [
            r["store"], f"{r['rows']:,}", r["dimensions"], f"{r['latency_ms']} ms",
            spread(r["reference_rows_per_second"]), spread(r["our_rows_per_second"]),
            _ratios(r["our_rows_per_second"], r["reference_rows_per_second"]),
            0.8 if r["latency_ms"] >= 200 else 0.65 if r["dimensions"] <= 384 else 0.6,
            spread(r["start_seconds"], 2),
        ]
        for r in results
    ]  # fmt: skip
    ready_columns = [
        "store",
        "rows",
        "dimensions",
        "latency",
        "reference: COPY, then HNSW, s",
        "ours: whole run, s",
        "ratio",
    ]
    ready = [
        [
            r["store"], f"{r['rows']:,}", r["dimensions"], f"{r['latency_ms']} ms",
            spread(r["reference_ready_seconds"], 1), spread(r["our_ready_seconds"], 1),
            _ratios(r["reference_ready_seconds"], r["our_ready_seconds"]),
        ]
        for r in results
        if r["our_ready_seconds"]
    ]  # fmt: skip
    rounds = " or ".join(map(str, sorted({len(result["our_rows_per_second"]) for result in results})))
    body = (
        f"Median of {rounds} alternating rounds (least to greatest), ratios round by round. Rows of 66 words.\n\n"
        f"{table(columns, lines)}\n\n"
        "Until the table can be queried, our fixed start, secondary indexes, VACUUM and swap included (target 0.9):\n\n"
        f"{table(ready_columns, ready)}"
    )
    record("engine", "The engine against the barest script", body, results, command)


def main() -> None:
    """Everything, or what the options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 1536])
    parser.add_argument("--latency-ms", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--stores", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--index-up-to", type=int, default=200_000_000, help="rows x dimensions; HNSW is left out above"
    )
    parser.add_argument("--qdrant-url", help="a Qdrant of yours instead of the embedded engine")
    parser.add_argument("--peers", nargs="*", choices=peers.NAMES, help="these peers; without names, all of them")
    parser.add_argument(
        "--only", nargs="+", default=["engine", "scenarios", "scaling", "memory"],
        choices=["engine", "scenarios", "scaling", "memory", "peers"],
    )  # fmt: skip
    options = parser.parse_args()
    with open_servers(options.qdrant_url) as servers:
        if "engine" in options.only:
            results = []
            for rows in options.rows:
                data.create_table(servers.database_url, rows)
                for dimensions in options.dimensions:
                    for latency in options.latency_ms:
                        for store in options.stores:
                            indexed = latency == min(options.latency_ms) and rows * dimensions <= options.index_up_to
                            results.append(
                                compare(servers, store, rows, dimensions, latency, runs=options.runs, indexed=indexed)
                            )
                            record_engine(results, "make bench")
        if options.peers is not None or "peers" in options.only:
            names = options.peers or peers.NAMES
            peers.measure(servers, min(options.rows), names)
            peer_scenarios.measure(servers, min(options.rows), names)
        if "scenarios" in options.only:
            scenarios.measure(servers, min(options.rows))
        if "scaling" in options.only:
            scaling.measure(servers, min(options.rows))
        if "memory" in options.only:
            memory.measure(servers, options.rows)


if __name__ == "__main__":
    main()
