"""`make bench-sync`: what a sync costs when nothing, a little or much has changed, against the size of the table.

The sets are loaded without their vector index (HNSW over a million vectors takes longer here than all the rest); no sync
reads it, but a write into an indexed table costs more than what is shown for changes.
"""

from __future__ import annotations

import argparse
import time

from benchmarks import data
from benchmarks.memory import run_in_child
from benchmarks.ours import Bench
from benchmarks.results import record, table
from benchmarks.servers import Servers, open_servers
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode

STORE_CALLS = ("create", "upsert", "delete", "fingerprints", "vectors", "count", "finish_load", "publish")
PER_MILLE = (0, 1, 10, 100)


def _count_store_calls(calls: list[str]) -> None:
    for name in STORE_CALLS:
        original = getattr(PgvectorStore, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(PgvectorStore, name, counted)


def _bytes_read(servers: Servers) -> int:
    """What the source's rows that were read come to."""
    return servers.sql(f"SELECT coalesce(sum(pg_column_size(title) + pg_column_size(body)), 0) FROM {data.TABLE}")[0][0]


def measure(servers: Servers, sizes: list[int]) -> None:
    """Builds a set of each size, then syncs it again and again."""
    calls: list[str] = []
    _count_store_calls(calls)
    lines: list[list[object]] = []
    loads: list[dict] = []
    for rows in sizes:
        begun = time.perf_counter()
        data.create_table(servers.database_url, rows)
        print(f"{rows:,} rows made in {time.perf_counter() - begun:.0f} s", flush=True)
        servers.provider.behave(latency_seconds=0.02)
        bench = Bench(servers, Mode.PLATFORM, 384)
        loads.append({"rows": rows, **run_in_child(bench)})
        print(loads[-1], flush=True)
        whole = _bytes_read(servers)
        for mille in PER_MILLE:
            if mille:
                servers.sql(f"UPDATE {data.TABLE} SET body = body || ' {mille}' WHERE id % 1000 < {mille}")
            runs = []
            for _ in range(3 if not mille else 1):
                calls.clear()
                runs.append(bench.run(TaskType.SYNC))
            run = min(runs, key=lambda item: item.seconds)
            report = run.report
            moved = whole * report.rows_read / rows
            lines.append(
                [
                    f"{rows:,}", f"{mille / 10:g} %", f"{run.seconds:.2f}", f"{report.seconds['digest']:.2f}",
                    f"{report.rows_read:,}", f"{report.rows_embedded:,}", f"{moved / 1e6:.2f}", f"{whole / 1e6:.0f}",
                    len(calls) if mille else f"{len(calls)}",
                ]
            )  # fmt: skip
            print(lines[-1], flush=True)
            record_sync(lines, loads)
        bench.close()


def record_sync(lines: list[list[object]], loads: list[dict]) -> None:
    """Both tables, as far as measured."""
    heads = [
        "rows in the table", "of them changed", "seconds", "of which digest", "rows read", "texts embedded",
        "MB of text read", "MB of a full read", "store calls",
    ]  # fmt: skip
    load_lines = [[f"{x['rows']:,}", f"{x['rows_per_second']:,.0f}", f"{x['peak_mb']:.0f}"] for x in loads]
    body = (
        "pgvector, 384 dimensions, 20 ms, the whole run from claim to end; unchanged: the best of three. Sets without their"
        f" vector index. Target: 1,000,000 rows unchanged below 2 s, 0 rows read, 0 store calls.\n\n{table(heads, lines)}\n\n"
        "The loads that made these sets, each in a process of its own:\n\n"
        f"{table(['rows', 'rows/s', 'peak RSS, MB'], load_lines)}"
    )
    record("sync", "Syncs", body, {"syncs": lines, "loads": loads}, "make bench-sync")


def main() -> None:
    """All sizes, or what the options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    with open_servers() as servers:
        measure(servers, options.rows)


if __name__ == "__main__":
    main()
