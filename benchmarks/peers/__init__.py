"""Other people's tools over the same table, the same provider and the same database, each in an environment of its own."""

from __future__ import annotations

import tempfile
from statistics import median

from benchmarks import data
from benchmarks.ours import Bench, without_index
from benchmarks.peers.environments import NAMES, drop, update
from benchmarks.results import record, table
from benchmarks.servers import Servers
from embedd_dagster.core.vector_table import Mode

__all__ = ["NAMES", "measure"]


def measure(servers: Servers, rows: int, names: list[str]) -> None:
    """Each peer cold, and ours (its whole run, index and swap included) in the same run."""
    data.create_table(servers.database_url, rows)
    servers.provider.behave(latency_seconds=0.02)
    loads, wholes = [], []
    for _ in range(3):
        bench = Bench(servers, Mode.PLATFORM, 384)
        wholes.append(bench.run().seconds)
        bench.close()
        bench = Bench(servers, Mode.PLATFORM, 384)
        with without_index():
            loads.append(bench.run().seconds)
        bench.close()
    whole, load = median(wholes), median(loads)
    found = {}
    for name in names:
        try:
            with tempfile.TemporaryDirectory() as directory:
                target = {"TARGET": f"bench_{name}", "STATE_DIR": directory}
                found[name] = update(servers, name, target)
                drop(servers, name, target)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
        print(name, found[name], flush=True)
    lines: list[list[object]] = [
        ["**ours**, whole run without the index, as the peers", f"{load:.2f}", f"{rows / load:,.0f}", "1.0", "", ""],
        ["**ours**, whole run with HNSW built", f"{whole:.2f}", f"{rows / whole:,.0f}", "", "1.0", ""],
    ]
    for name, result in found.items():
        if "error" in result:
            lines.append([name, "not measured", "", "", "", result["error"].replace("\n", " ").replace("|", "/")])
        else:
            seconds = result["seconds"] * rows / result["rows"]
            rate = f"{rows / seconds:,.0f}"
            lines.append(
                [name, f"{seconds:.2f}", rate, f"{seconds / load:.1f}", f"{seconds / whole:.1f}", result["what"]]
            )
    heads = ["", "seconds", "rows/s", "ours is so many times faster, like for like", "with our index counted", ""]
    body = (
        f"{rows:,} rows, 384 dimensions, 20 ms, into pgvector, cold. Peers build no index; their imports are not counted, our"
        f" fixed start is. Target: five times the best.\n\n{table(heads, lines)}"
    )
    record("peers", "Peers", body, {"load": loads, "whole": wholes, "peers": found, "rows": rows}, "make bench")
