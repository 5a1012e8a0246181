"""What happens after the first load, and when things go wrong: ours alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import data
from benchmarks.ours import Bench
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers
from embedd_dagster.catalog import tasks
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode
from tests.support.openai_server import POISON

VICTIM = Path(ROOT) / "tests" / "support" / "run_and_die.py"


def measure(servers: Servers, rows: int) -> None:
    """All scenarios over one table at 20 ms and 384 dimensions into pgvector."""
    provider = servers.provider
    lines: list[list[object]] = []

    def note(name: str, run, extra: str = "") -> None:
        report, seen = run.report, provider.stats()
        lines.append(
            [
                name, f"{run.seconds:.2f}", report.rows_read, seen["texts"], seen["requests"], report.rows_rewritten,
                report.rows_deleted, report.rows_failed, extra,
            ]
        )  # fmt: skip
        print(lines[-1], flush=True)

    def fresh() -> Bench:
        data.create_table(servers.database_url, rows)
        provider.reset()
        provider.behave(latency_seconds=0.02)
        return Bench(servers, Mode.PLATFORM, 384)

    def again() -> None:
        provider.reset()
        provider.behave(latency_seconds=0.02)

    bench = fresh()
    first = bench.run()
    note("cold", first)
    again()
    note("nothing changed", bench.run(TaskType.SYNC))
    again()
    servers.sql(f"UPDATE {data.TABLE} SET body = body || ' changed' WHERE id % 100 = 1")
    servers.sql(f"DELETE FROM {data.TABLE} WHERE id % 100 = 2")
    note("1 % text edits, 1 % deletes", bench.run(TaskType.SYNC))
    again()
    servers.sql(f"UPDATE {data.TABLE} SET price = price + 1 WHERE id % 100 = 3")
    note("1 % metadata edits", bench.run(TaskType.SYNC))
    again()
    note("backfill again, nothing changed", bench.run(TaskType.REBACKFILL))
    bench.close()

    bench = fresh()
    servers.sql(f"UPDATE {data.TABLE} SET body = body || %s WHERE id = 77", POISON)
    note("cold, one poisoned row", bench.run(), "the batch is halved down to the row")
    bench.close()

    bench = fresh()
    provider.behave(refuse_every=3)
    run = bench.run()
    rate = run.load_rate / first.load_rate
    note(
        "cold, every third request 429", run, f"load at {rate:.0%} of the undisturbed one; {run.report.retries} retries"
    )
    bench.close()

    bench = fresh()
    task_id = bench.add_task(max_attempts=3)
    upserts = max(2, rows // 512)
    begun = time.perf_counter()
    victim = subprocess.run(
        [sys.executable, str(VICTIM), task_id, "victim", "after:upsert", str(upserts)],
        env=bench.environment(), check=False, capture_output=True,
    )  # fmt: skip
    assert victim.returncode == -signal.SIGKILL, victim.stderr.decode()
    lost = time.perf_counter() - begun
    with bench.runtime.catalog.transaction() as session:
        tasks.fail(session, tasks.find(session, task_id, lock=True), "The run died.", retry=True)
    run = bench.run(task_id=task_id)
    twice = provider.stats()["texts"] - rows
    note(
        "kill -9 in the middle, then the next run",
        run,
        f"{twice} texts paid for twice; the killed process lived {lost:.1f} s",
    )
    bench.close()

    columns = [
        "scenario", "seconds", "rows read", "texts the provider answered", "requests", "rewritten", "deleted", "failed", "",
    ]  # fmt: skip
    body = f"{rows:,} rows, pgvector with its index, 384 dimensions, 20 ms; one run each.\n\n{table(columns, lines)}"
    record("scenarios", "After the first load, and when things go wrong", body, lines, "make bench")
