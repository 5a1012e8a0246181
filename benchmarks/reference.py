"""The barest script that does the main job, as the limit that the engine is measured against.

Keyset read → base64 batches with several in flight → binary COPY, or upserts into Qdrant. No state, no retry, no hashes,
no metadata: one file that a good engineer would write for one night.
"""

from __future__ import annotations

import base64
import struct
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import orjson
import psycopg

from benchmarks.data import TABLE

BATCH_ROWS = 256
IN_FLIGHT = 16

Batch = tuple[list[int], list[str], np.ndarray]


def run_pgvector(database_url: str, base_url: str, dimensions: int) -> None:
    """Embeds the whole table into `bench_reference`."""
    with psycopg.connect(database_url, autocommit=True) as writer:
        writer.execute("DROP TABLE IF EXISTS bench_reference")
        writer.execute(
            f"CREATE TABLE bench_reference (id bigint PRIMARY KEY, embedding vector({dimensions}), embedded_text text)"
        )

        def copy(ids: list[int], texts: list[str], vectors: np.ndarray) -> None:
            vectors = vectors.astype(">f4")
            head = struct.pack(">hh", dimensions, 0)
            size = 4 + 4 * dimensions
            parts = [b"PGCOPY\n\xff\r\n\0" + struct.pack(">II", 0, 0)]
            for index, (key, text) in enumerate(zip(ids, texts, strict=True)):
                raw = text.encode()
                fixed = struct.pack(">hiqi", 3, 8, key, size)
                parts.append(fixed + head + vectors[index].tobytes() + struct.pack(">i", len(raw)) + raw)
            parts.append(struct.pack(">h", -1))
            statement = "COPY bench_reference (id, embedding, embedded_text) FROM STDIN (FORMAT BINARY)"
            with writer.cursor() as cursor, cursor.copy(statement) as target:
                target.write(b"".join(parts))

        _stream(database_url, base_url, dimensions, on_arrival=lambda *batch: batch, in_order=copy)


def index_pgvector(database_url: str, memory_mb: int) -> float:
    """The seconds that HNSW over `bench_reference` takes, with as much memory for it as ours takes."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"SET maintenance_work_mem = '{memory_mb}MB'")
        begun = time.perf_counter()
        connection.execute("CREATE INDEX ON bench_reference USING hnsw (embedding vector_cosine_ops)")
        return time.perf_counter() - begun


def run_qdrant(database_url: str, base_url: str, dimensions: int, qdrant_url: str) -> None:
    """Embeds the whole table into the collection `bench_reference`, without an index."""
    collection = "/collections/bench_reference"
    with httpx.Client(timeout=60, trust_env=False, base_url=qdrant_url) as qdrant:
        qdrant.delete(collection)
        body = {"vectors": {"size": dimensions, "distance": "Cosine"}, "optimizers_config": {"indexing_threshold": 0}}
        qdrant.put(collection, json=body).raise_for_status()

        def upsert(ids: list[int], texts: list[str], vectors: np.ndarray) -> None:
            points = {"ids": ids, "vectors": vectors, "payloads": [{"embedded_text": text} for text in texts]}
            content = orjson.dumps({"batch": points}, option=orjson.OPT_SERIALIZE_NUMPY)
            qdrant.put(f"{collection}/points?wait=true", content=content).raise_for_status()

        _stream(database_url, base_url, dimensions, on_arrival=upsert, in_order=lambda *_written: None)


def _stream(
    database_url: str, base_url: str, dimensions: int, *, on_arrival: Callable, in_order: Callable[..., None]
) -> None:
    """Reads and embeds; `on_arrival` takes a batch in the thread that embedded it, `in_order` what that gave."""
    with (
        psycopg.connect(database_url, autocommit=True) as reader,
        httpx.Client(timeout=60, limits=httpx.Limits(max_connections=IN_FLIGHT), trust_env=False) as client,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):

        def embed(ids: list[int], texts: list[str]) -> Batch | None:
            body = {
                "model": "text-embedding-3-small",
                "input": texts,
                "dimensions": dimensions,
                "encoding_format": "base64",
            }
            answer = orjson.loads(
                client.post(f"{base_url}/embeddings", content=orjson.dumps(body)).raise_for_status().content
            )
            raw = b"".join(base64.b64decode(item["embedding"]) for item in answer["data"])
            return on_arrival(ids, texts, np.frombuffer(raw, dtype="<f4").reshape(len(texts), dimensions))

        in_flight: deque[Future] = deque()
        last = -1
        while rows := reader.execute(
            f"SELECT id, title, body FROM {TABLE} WHERE id > %s ORDER BY id LIMIT 2048", [last]
        ).fetchall():
            last = rows[-1][0]
            for start in range(0, len(rows), BATCH_ROWS):
                part = rows[start : start + BATCH_ROWS]
                texts = [f"title: {title}\n{body}" for _key, title, body in part]
                in_flight.append(pool.submit(embed, [row[0] for row in part], texts))
                if len(in_flight) >= IN_FLIGHT:
                    in_order(*(in_flight.popleft().result() or ()))
        while in_flight:
            in_order(*(in_flight.popleft().result() or ()))
