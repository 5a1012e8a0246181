"""The peers' programs: each `NAME/run.py`, in an environment of its own that is made on demand.

A program brings the target that `TARGET` names up to date with the source, remembers in `STATE_DIR` what it has to, and prints
a line of JSON: the rows of the target, the seconds without its imports, and what it is. With the argument `count` it only counts,
with `drop` it takes the target away.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.servers import ROOT, Servers

HERE = Path(__file__).parent
NAMES = ["langchain", "llamaindex", "pgai", "cocoindex"]
_ERROR_LINE = re.compile(r"^(?:.*\[error *\] *|(?=[\w.]+(?:Error|Exception)\b))(.{,60})", re.MULTILINE)
TIMEOUT_SECONDS = int(os.environ.get("BENCH_PEER_TIMEOUT", "300"))


def update(servers: Servers, name: str, target: Mapping[str, str]) -> dict[str, Any]:
    """What the program printed. Raises RuntimeError with what it said where it fails, TimeoutExpired where it does not end."""
    return _finish(servers, start(servers, name, target))


def count(servers: Servers, name: str, target: Mapping[str, str]) -> int:
    """The rows of the target."""
    return int(_finish(servers, start(servers, name, target, "count"))["rows"])


def drop(servers: Servers, name: str, target: Mapping[str, str]) -> None:
    """Takes the target away."""
    _finish(servers, start(servers, name, target, "drop"))


def start(servers: Servers, name: str, target: Mapping[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """The program, started, in a session of its own."""
    python = _environment(name)
    environment = {
        **os.environ,
        "DATABASE_URL": servers.database_url, "OPENAI_BASE_URL": servers.provider.base_url, "OPENAI_API_KEY": "sk-bench",
        "SOURCE_TABLE": data.TABLE, "NO_PROXY": "127.0.0.1", "PYTHONPATH": "",
        "LANGCHAIN_TRACING_V2": "false", "LANGSMITH_TRACING": "false", "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "1",
        "COCOINDEX_DISABLE_USAGE_TRACKING": "1", "OTEL_SDK_DISABLED": "true", "PATH": f"{python.parent}:{os.environ['PATH']}",
        **target,
    }  # fmt: skip
    return subprocess.Popen(
        [str(python), str(HERE / name / "run.py"), *arguments], env=environment, cwd=HERE / name,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _finish(servers: Servers, program: subprocess.Popen[bytes]) -> dict[str, Any]:
    try:
        output, said_bytes = program.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, 9)
        program.communicate()
        raise
    if program.returncode != 0:
        said = said_bytes.decode(errors="replace").strip().replace(servers.database_url, "DATABASE_URL")
        # what went wrong first, where the tool says so; otherwise the error that ended it; without the text of the row behind it
        errors = _ERROR_LINE.findall(said)
        raise RuntimeError((errors[0] if "[error" in said else errors[-1]) if errors else said[-100:])
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def _environment(name: str) -> Path:
    """The interpreter of the peer's environment, made where it is not there."""
    directory = Path(os.environ.get("BENCH_PEER_ENVS", HERE / ".envs")) / name
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / name / "requirements.txt")]
        subprocess.run(install, check=True, cwd=ROOT)
    return python
