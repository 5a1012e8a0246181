"""Peak memory of the process that runs a backfill, against the size of the table, and over wide rows.

As a program it is one backfill: `python -m benchmarks.memory TASK_ID`, with the settings in the environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import data
from benchmarks.ours import Bench, leave_out_hnsw
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, Mode
from embedd_dagster.engine.run import run_task
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import read_settings

WIDE = "bench_wide"
WIDE_ROWS = 1000


def run_in_child(bench: Bench) -> dict[str, float]:
    """One backfill in a process of its own: peak_mb, rows, rows_per_second."""
    command = [sys.executable, "-m", "benchmarks.memory", bench.add_task()]
    done = subprocess.run(command, env=bench.environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def create_wide_table(servers: Servers) -> None:
    """Rows of 100 columns, among them a text of 1 MB that does not compress: the most that a row may have as metadata."""
    servers.sql(f"DROP TABLE IF EXISTS {WIDE}")
    others = ", ".join(f"c{n} text DEFAULT 'value of column {n}'" for n in range(97))
    servers.sql(f"CREATE TABLE {WIDE} (id bigint PRIMARY KEY, title text, body text, {others})")
    servers.sql(
        f"INSERT INTO {WIDE} (id, title, body) SELECT n, 'title ' || n, (SELECT string_agg(md5((n * 32768 + w)::text), ' ')"
        f" FROM generate_series(1, 31700) w) FROM generate_series(1, {WIDE_ROWS}) n"
    )


def measure(servers: Servers, sizes: list[int]) -> None:
    """The curve; the index is left out, as the database builds it."""
    servers.provider.behave(latency_seconds=0.02)
    lines, found = [], []

    def note(name: str, bench: Bench) -> None:
        result = run_in_child(bench)
        bench.close()
        found.append({"what": name, **result})
        lines.append(
            [name, f"{result['peak_mb']:.0f}", f"{result['before_mb']:.0f}", f"{result['rows_per_second']:,.0f}"]
        )
        print(lines[-1], flush=True)

    for rows in sizes:
        data.create_table(servers.database_url, rows)
        note(f"{rows:,} rows of 66 words × 384", Bench(servers, Mode.PLATFORM, 384))
    create_wide_table(servers)
    columns = (
        Column("title", ColumnRole.EMBEDDING, ordinal=1, name_prefix="title: "),
        Column("body", ColumnRole.EMBEDDING, ordinal=2),
        *(Column(f"c{n}", ColumnRole.METADATA, filter_type=FilterType.KEYWORD) for n in range(20)),
    )
    note(
        f"{WIDE_ROWS:,} rows of 100 columns (22 configured), a text of 1 MB each",
        Bench(servers, Mode.PLATFORM, 384, source_table=WIDE, columns=columns),
    )
    filtered = (columns[0], Column("body", ColumnRole.METADATA, filter_type=FilterType.KEYWORD))
    for mode, store in (Mode.PLATFORM, "pgvector"), (Mode.MANAGED, "Qdrant"):
        bench = Bench(servers, mode, 384, source_table=WIDE, columns=filtered)
        note(f"{WIDE_ROWS:,} rows with metadata of 1 MB each, in {store}", bench)
    heads = ["table", "peak RSS, MB", "of it before the run began", "rows/s (load)"]
    conditions = "pgvector where nothing is said, 20 ms, 16 requests in flight"
    body = f"{conditions}; target: below 300 MB, flat from 100,000 rows on.\n\n{table(heads, lines)}"
    record("memory", "Memory", body, found, "make bench")


def _resident_mb(field: str) -> float:
    # not ru_maxrss: that begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def main() -> None:
    """One task, its peak on standard output."""
    before = _resident_mb("VmRSS")
    leave_out_hnsw()
    with Runtime.open(read_settings()) as runtime:
        report = run_task(runtime, sys.argv[1], "bench", log=lambda _message: None, should_stop=lambda: False)
    rate = report.rows_read / report.seconds["load"]
    print(
        json.dumps(
            {"peak_mb": _resident_mb("VmHWM"), "before_mb": before, "rows": report.rows_read, "rows_per_second": rate}
        )
    )


if __name__ == "__main__":
    main()
