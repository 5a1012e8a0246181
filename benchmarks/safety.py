"""The crash, model and isolation tests with new random examples, recorded: `python -m benchmarks.safety`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.results import ROOT, record, table

SUITES = {
    "kill -9 of a backfill or a sync at every stage": ["tests/engine/test_crash.py"],
    "kill -9 of a CDC consumer at every stage": ["tests/engine/cdc/test_crash.py"],
    "random edits, configurations and failures against a model": [
        "tests/engine/test_model.py",
        "tests/engine/cdc/test_model.py",
    ],
    "a run or consumer that was replaced writes nothing": ["tests/engine/test_superseded.py"],
    "Dagster: dead runs, dead code servers, lost launches": ["tests/defs/test_recovery.py"],
    "one tenant's requests against another's": ["tests/api/test_isolation.py", "tests/api/test_auth.py"],
    "hostile names and values": ["tests/api/test_injection.py", "tests/connectors/postgresql/test_hostile_names.py"],
    "secrets and row contents in logs, errors and the database": ["tests/api/test_canaries.py"],
    "a full disk": ["tests/stack/test_full_disk.py"],
}


def run(files: list[str]) -> tuple[int, int, int, float]:
    """Runs these files with new examples. Passed, failed and skipped tests, and seconds."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "TEST_EXAMPLES": "other"}, check=False)
        suite = ElementTree.parse(report).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    return int(suite["tests"]) - failed - skipped, failed, skipped, float(suite["time"])


def main() -> None:
    rows: list[list[object]] = []
    for title, files in SUITES.items():
        passed, failed, skipped, seconds = run(files)
        rows.append([title, ", ".join(f"`{name}`" for name in files), passed, failed, skipped, f"{seconds:.0f} s"])
    body = table(["what", "tests", "passed", "failed", "skipped", "took"], rows)
    record("safety", "Crashes and isolation", body, rows, "python -m benchmarks.safety")


if __name__ == "__main__":
    main()
