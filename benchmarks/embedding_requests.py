"""CPU of a request to a provider: packing the texts, sending them, reading the answer, making numpy vectors of it.

`python -m benchmarks.embedding_requests --before DIRECTORY` compares with another checkout: processes of both alternate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.results import ROOT, record, table
from tests.support.openai_server import running_openai_server

_SHAPES = ((256, 384), (256, 1536))
_ROUNDS = 3
_REQUESTS = 40
_WORDS = "the quick brown fox jumps over the lazy dog and runs through the field into the dark wood "


def measure(base_url: str, texts: int, dimensions: int) -> float:
    """Milliseconds of this process' CPU per request, all threads together; without the first five."""
    from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder

    batch = [f"{number} {_WORDS * 4}" for number in range(texts)]
    embedder = OpenAIEmbedder(
        model="text-embedding-3-small", dimensions=dimensions, api_key="k", base_url=base_url, concurrency=1
    )
    with embedder:
        for _ in range(5):
            embedder.embed_documents(batch)
        start = time.process_time()
        for _ in range(_REQUESTS):
            embedder.embed_documents(batch)
        return (time.process_time() - start) / _REQUESTS * 1000


def _measure_in(checkout: Path, base_url: str, texts: int, dimensions: int) -> float:
    code = f"import sys; sys.path.insert(0, {str(checkout)!r}); sys.path.append({str(ROOT)!r})\n"
    code += f"from benchmarks.embedding_requests import measure; print(measure({base_url!r}, {texts}, {dimensions}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, action="append", default=[], help="another checkout, may be repeated")
    checkouts = {**{path.name: path.resolve() for path in parser.parse_args().before}, "now": ROOT}
    rows = []
    with running_openai_server() as server:
        for texts, dimensions in _SHAPES:
            found: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(_ROUNDS):
                for name, checkout in checkouts.items():
                    found[name].append(_measure_in(checkout, server.base_url, texts, dimensions))
            rows += [{"shape": f"{texts} × {dimensions:,}", "checkout": name, "ms": found[name]} for name in checkouts]
    body = table(
        ["texts × dimensions", "code", "ms of CPU a request: median (least)"],
        [[row["shape"], row["checkout"], f"{median(row['ms']):.2f} ({min(row['ms']):.2f})"] for row in rows],
    )
    command = "python -m benchmarks.embedding_requests" + " --before …" * (len(checkouts) - 1)
    record("embedding_requests", "CPU of a request to a provider", body, rows, command)


if __name__ == "__main__":
    main()
