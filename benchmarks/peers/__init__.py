"""Other people's tools over the same table, the same provider and the same database, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks import data
from benchmarks.ours import Bench, without_index
from benchmarks.results import record, table
from benchmarks.servers import ROOT, Servers
from embedd_dagster.core.vector_table import Mode

HERE = Path(__file__).parent
NAMES = ["langchain", "llamaindex", "pgai", "cocoindex"]
TIMEOUT_SECONDS = int(os.environ.get("BENCH_PEER_TIMEOUT", "300"))


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
            found[name] = _run(servers, name)
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


def _run(servers: Servers, name: str) -> dict:
    python = _environment(name)
    environment = {
        **os.environ,
        "DATABASE_URL": servers.database_url, "OPENAI_BASE_URL": servers.provider.base_url, "OPENAI_API_KEY": "sk-bench",
        "SOURCE_TABLE": data.TABLE, "NO_PROXY": "127.0.0.1", "PYTHONPATH": "",
        "LANGCHAIN_TRACING_V2": "false", "LANGSMITH_TRACING": "false", "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "1",
        "COCOINDEX_DISABLE_USAGE_TRACKING": "1", "OTEL_SDK_DISABLED": "true", "PATH": f"{python.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [str(python), str(HERE / name / "run.py")], env=environment, cwd=HERE / name, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.strip().replace(servers.database_url, "DATABASE_URL")
        # what went wrong first, where the tool says so; else the end of what it said
        raise RuntimeError(next((line for line in said.splitlines() if "[error" in line), said)[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def _environment(name: str) -> Path:
    """The interpreter of the peer's environment, made where it is not there."""
    directory = Path(os.environ.get("BENCH_PEER_ENVS", HERE / ".envs")) / name
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / name / "requirements.txt")]
        subprocess.run(install, check=True, cwd=ROOT)
    return python
