"""Recorded results: a Markdown and a JSON file a benchmark, and the page in the docs made of all of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
ORDER = (
    "engine",
    "peers",
    "peer_scenarios",
    "scenarios",
    "scaling",
    "memory",
    "sync",
    "follow",
    "api",
    "embedding_requests",
    "safety",
    "api_before_after",
    "qdrant_transport",
)


def spread(values: list[float], digits: int = 0) -> str:
    """The median, with the least and the greatest."""
    shown = f"{median(values):,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(columns: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def earlier(name: str) -> list:
    """The data of the last record, if any."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["data"] if path.exists() else []


def record(name: str, title: str, body: str, data: object, command: str) -> None:
    """Writes what a benchmark found, and the docs page again."""
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=False, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    told = f"`{command}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit} (working tree), {machine}."
    (RESULTS / f"{name}.md").write_text(f"## {title}\n\n{told}\n\n{body}\n")
    (RESULTS / f"{name}.json").write_text(json.dumps({"told": told, "data": data}, indent=1, default=str) + "\n")
    write_page()
    print(f"\n{body}\n", flush=True)


def write_page() -> None:
    """The docs page, of all that is recorded."""
    parts = [path.read_text() for part in ORDER if (path := RESULTS / f"{part}.md").exists()]
    head = (
        "# Benchmarks\n\nWritten by `make bench`, `make bench-sync`, `make bench-follow` and `make bench-api`; what is measured"
        " and how is in [`benchmarks/README.md`](../benchmarks/README.md).\nRatios are those of one run on one machine; absolute"
        " numbers move with the machine.\n\n"
    )
    PAGE.write_text(head + "\n".join(parts))
