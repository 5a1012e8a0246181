"""Rows a second against the number of requests in flight and the size of a batch: is the default near the knee?"""

from __future__ import annotations

from benchmarks import data
from benchmarks.ours import Bench, without_index
from benchmarks.results import record, table
from benchmarks.servers import Servers
from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
from embedd_dagster.core.vector_table import Mode

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (64, 128, 256, 512, 1024)
LATENCIES_MS = (20, 200)
_DEFAULT_CONCURRENCY = 16  # of an embedding provider whose limits say nothing


def measure(servers: Servers, rows: int) -> None:
    """pgvector, 384 dimensions, the load alone; the better of two runs."""
    data.create_table(servers.database_url, rows)

    def rate(latency_ms: int, concurrency: int) -> float:
        servers.provider.behave(latency_seconds=latency_ms / 1000)
        rates = []
        for _ in range(2):
            bench = Bench(servers, Mode.PLATFORM, 384, concurrency=concurrency)
            with without_index():
                rates.append(bench.run().load_rate)
            bench.close()
            if rates[0] < 4000:  # slow runs are steady
                break
        return max(rates)

    default_batch = OpenAIEmbedder.max_items
    by_concurrency = {n: [rate(ms, n) for ms in LATENCIES_MS] for n in CONCURRENCIES}
    by_batch = {}
    for size in BATCHES:
        OpenAIEmbedder.max_items = size
        by_batch[size] = [rate(ms, _DEFAULT_CONCURRENCY) for ms in LATENCIES_MS]
    OpenAIEmbedder.max_items = default_batch

    def lines(found: dict[int, list[float]], default: int) -> list[list[object]]:
        return [
            [f"**{n}** (default)" if n == default else n, *(f"{x:,.0f}" for x in rates)] for n, rates in found.items()
        ]

    heads = [f"rows/s at {ms} ms" for ms in LATENCIES_MS]
    body = (
        f"{rows:,} rows into pgvector, 384 dimensions, load alone, the better of two runs.\n\n"
        f"{table(['requests in flight', *heads], lines(by_concurrency, _DEFAULT_CONCURRENCY))}\n\n"
        f"{table(['texts a request', *heads], lines(by_batch, default_batch))}"
    )
    record("scaling", "Scaling", body, {"concurrency": by_concurrency, "batch": by_batch}, "make bench")
