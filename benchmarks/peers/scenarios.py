"""What a second pass costs, and what faults do: ours and the peers over the same rows, changes and faults.

The columns to compare are the texts that the provider answered, for they are paid for, and the rows that arrived.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from benchmarks import data
from benchmarks.ours import Bench
from benchmarks.peers.environments import NAMES, count, drop, start, update
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers
from embedd_dagster.catalog import tasks, vector_tables
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode
from tests.support.openai_server import POISON

VICTIM = Path(ROOT) / "tests" / "support" / "run_and_die.py"
NEVER = "1000000000"
DIMENSIONS = 384


class Subject(Protocol):
    """One tool with a fresh target."""

    def update(self) -> float:
        """Brings the target up to date; the seconds that took. Raises where it does not come to an end."""

    def start(self) -> subprocess.Popen[bytes]:
        """An update in a process of its own, to be killed."""

    def recover(self) -> float:
        """The update after one that was killed."""

    def count(self) -> int:
        """The rows of the target."""

    def close(self) -> None:
        """Gives back what it holds."""


class Ours:
    """Ours, as in the other benchmarks; with its index."""

    def __init__(self, servers: Servers) -> None:
        self._bench = Bench(servers, Mode.PLATFORM, DIMENSIONS)
        self._task_id = ""
        self._built = False

    def update(self) -> float:
        run = self._bench.run(TaskType.SYNC if self._built else TaskType.BACKFILL)
        self._built = True
        return run.seconds

    def start(self) -> subprocess.Popen[bytes]:
        self._task_id = self._bench.add_task(max_attempts=3)
        command = [sys.executable, str(VICTIM), self._task_id, "victim", "after:upsert", NEVER]
        return subprocess.Popen(command, env=self._bench.environment(), start_new_session=True)

    def recover(self) -> float:
        with self._bench.runtime.catalog.transaction() as session:
            task = tasks.find(session, self._task_id, lock=True)
            assert task is not None
            tasks.fail(session, task, "The run died.", retry=True)
        return self._bench.run(task_id=self._task_id).seconds

    def count(self) -> int:
        with self._bench.runtime.catalog.transaction() as session:
            return vector_tables.get(session, self._bench.environment_id, self._bench.vector_table_id).synced_rows or 0

    def close(self) -> None:
        self._bench.close()


class Peer:
    """A peer, with a target and a directory of its own for what it remembers."""

    def __init__(self, servers: Servers, name: str) -> None:
        self._servers, self._name = servers, name
        self._directory = tempfile.TemporaryDirectory(prefix=f"embedd-bench-{name}-")
        self._target = {"TARGET": f"bench_{name}_{uuid4().hex[:8]}", "STATE_DIR": self._directory.name, "DOCSTORE": "1"}

    def update(self) -> float:
        return float(update(self._servers, self._name, self._target)["seconds"])

    def start(self) -> subprocess.Popen[bytes]:
        return start(self._servers, self._name, self._target)

    def recover(self) -> float:
        return self.update()

    def count(self) -> int:
        return count(self._servers, self._name, self._target)

    def close(self) -> None:
        drop(self._servers, self._name, self._target)
        self._directory.cleanup()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass did: in how many seconds, for how many texts, with how many rows in source and target at its end."""

    scenario: str
    texts: int
    source_rows: int
    target_rows: int
    seconds: float | None = None
    error: str | None = None

    def __str__(self) -> str:
        told = [f"{self.texts:,} texts"]
        told.append("does not end well" if self.seconds is None else f"{self.seconds:.2f} s")
        if self.target_rows != self.source_rows:
            told.append(f"**{self.target_rows:,} of {self.source_rows:,} rows**")
        return ", ".join(told)


def measure(servers: Servers, rows: int, names: list[str] = NAMES) -> None:
    """Every scenario of every tool, one after the other."""
    made: dict[str, Callable[[], Subject]] = {"ours": lambda: Ours(servers)}
    for name in names:
        made[name] = lambda name=name: Peer(servers, name)  # type: ignore[misc]
    found = {name: _outcomes(servers, rows, make) for name, make in made.items()}
    scenarios = [outcome.scenario for outcome in found["ours"]]
    lines: list[list[object]] = [
        [scenario, *(outcomes[place] for outcomes in found.values())] for place, scenario in enumerate(scenarios)
    ]
    body = (
        f"{rows:,} rows, {DIMENSIONS} dimensions, 20 ms, into pgvector: the texts that the provider answered, and the seconds"
        " of the pass. Only ours builds an index (in the passes that load). One run each; LlamaIndex with its docstore,"
        " the others as above; every client's own retries.\n\n"
        f"{table(['', *(f'**{name}**' if name == 'ours' else name for name in found)], lines)}"
    )
    errors = [
        f"- {name}, {outcome.scenario}: {outcome.error}"
        for name, outcomes in found.items()
        for outcome in outcomes
        if outcome.error
    ]
    if errors:
        body += "\n\nWhere it does not end well:\n\n" + "\n".join(errors)
    kept = {name: [asdict(outcome) for outcome in outcomes] for name, outcomes in found.items()}
    record("peer_scenarios", "Second passes and faults, with peers", body, kept, "make bench")


def _outcomes(servers: Servers, rows: int, make: Callable[[], Subject]) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def take(scenario: str, subject: Subject, run: Callable[[], float]) -> None:
        seconds = error = None
        try:
            seconds = run()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}".replace("\n", " ").replace("|", "/")
        (source_rows,) = servers.sql(f"SELECT count(*) FROM {data.TABLE}")[0]
        texts = servers.provider.stats()["texts"]
        outcomes.append(Outcome(scenario, texts, source_rows, subject.count(), seconds, error))
        print(outcomes[-1], flush=True)
        _reset(servers)

    def fresh() -> Subject:
        data.create_table(servers.database_url, rows)
        _reset(servers)
        return make()

    subject = fresh()
    take("cold", subject, subject.update)
    take("nothing changed", subject, subject.update)
    servers.sql(f"UPDATE {data.TABLE} SET body = body || ' changed' WHERE id % 100 = 1")
    servers.sql(f"DELETE FROM {data.TABLE} WHERE id % 100 = 2")
    take("1 % text edits, 1 % deletes", subject, subject.update)
    servers.sql(f"UPDATE {data.TABLE} SET price = price + 1 WHERE id % 100 = 3")
    take("1 % metadata edits", subject, subject.update)
    subject.close()

    subject = fresh()
    servers.sql(f"UPDATE {data.TABLE} SET body = body || %s WHERE id = 77", POISON)
    take("cold, one poisoned row", subject, subject.update)
    subject.close()

    subject = fresh()
    servers.provider.behave(refuse_every=3)
    take("cold, every third request 429", subject, subject.update)
    subject.close()

    subject = fresh()
    _kill_in_the_middle(servers, subject, rows)
    take("kill -9 at half, then the next pass", subject, subject.recover)
    subject.close()
    return outcomes


def _reset(servers: Servers) -> None:
    servers.provider.reset()
    servers.provider.behave(latency_seconds=0.02)


def _kill_in_the_middle(servers: Servers, subject: Subject, rows: int) -> None:
    victim = subject.start()
    try:
        while servers.provider.stats()["texts"] < rows // 2:
            if victim.poll() is not None:
                raise RuntimeError("it ended before it could be killed")
            time.sleep(0.005)
    finally:
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
