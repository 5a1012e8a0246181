"""What a payload index costs when Qdrant builds its graph, and what filtered searches find: `python -m benchmarks.qdrant_index`.

Over Qdrant Edge itself, the engine of the embedded server. Vectors lie in clusters, as those of texts do; the filters are
independent of them. Each variant is built from a copy of the same points.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import qdrant_edge as edge

DIMENSIONS = 384
QUERIES = 100
LINKED: dict[str, bool] = {}
UNLINKED = {"enable_hnsw": False}
VARIANTS = {
    "no payload index": None,
    "links for every field": (LINKED, LINKED),
    "links, but not for the bucket": (UNLINKED, LINKED),
    "no links": (UNLINKED, UNLINKED),
}


def make_vectors(count: int) -> np.ndarray:
    """`count` vectors to store, then those of the queries."""
    generator = np.random.default_rng(1)
    centers = generator.normal(size=(2000, 48)).astype("f4")
    spread = generator.normal(size=(48, DIMENSIONS)).astype("f4")
    near = centers[generator.integers(0, 2000, count + QUERIES)]
    near = near + 0.6 * generator.normal(size=near.shape).astype("f4")
    vectors = near @ spread + 0.5 * generator.normal(size=(len(near), DIMENSIONS)).astype("f4")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filters(count: int) -> dict[str, object]:
    """By name: what share of the points they allow."""

    def cheaper(share: float) -> edge.FieldCondition:
        return edge.FieldCondition("price", range=edge.RangeFloat(lt=count * share / 10))

    red = edge.FieldCondition("category", match=edge.MatchValue("red"))
    ranges = {f"{share:.1%}": edge.Filter(must=[cheaper(share)]) for share in (0.001, 0.01, 0.1, 0.2, 0.5)}
    return {**ranges, "a third": edge.Filter(must=[red]), "two columns, 17%": edge.Filter(must=[red, cheaper(0.5)])}


def config() -> edge.EdgeConfig:
    """Qdrant's defaults."""
    return edge.EdgeConfig(
        vectors=edge.EdgeVectorParams(size=DIMENSIONS, distance=edge.Distance.Cosine),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=10_000),
    )


def load(path: Path, vectors: np.ndarray) -> None:
    """The points, without any index."""
    path.mkdir()
    shard = edge.EdgeShard.create(str(path), config())
    count = len(vectors)
    for start in range(0, count, 2000):
        points = [
            edge.Point(
                number,
                vectors[number].tolist(),
                {
                    "bucket": number * 2654435761 % 65536,
                    "category": ("red", "green", "blue")[number % 3],
                    "price": number * 7919 % count / 10,
                },
            )
            for number in range(start, min(start + 2000, count))
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.flush()
    shard.close()


def find(shard: edge.EdgeShard, query: np.ndarray, where: object, **params: object) -> set[object]:
    """The ids of the nearest ten."""
    request = edge.QueryRequest(
        limit=10, query=edge.Query.Nearest(query.tolist()), filter=where, params=edge.SearchParams(**params)
    )
    return {point.id for point in shard.query(request)}


def measure(path: Path, name: str, count: int, queries: np.ndarray) -> None:
    """Builds one variant and asks it."""
    shard = edge.EdgeShard.load(str(path), config())
    links = VARIANTS[name]
    if links is not None:
        bucket, columns = links
        schemas = {
            "bucket": edge.IntegerIndexParams(**bucket),
            "category": edge.KeywordIndexParams(**columns),
            "price": edge.FloatIndexParams(**columns),
        }
        for field, schema in schemas.items():
            shard.update(edge.UpdateOperation.create_field_index(field, schema))
    begun, cpu = time.perf_counter(), time.process_time()
    shard.optimize()
    print(f"{name}: built in {time.perf_counter() - begun:.1f} s, {time.process_time() - cpu:.1f} s of CPU", flush=True)
    acorn = edge.AcornSearchParams(enable=True, max_selectivity=0.7)
    for label, where in filters(count).items() if links is not None else ():
        told = []
        for params in ({}, {"acorn": acorn}):
            hits, seconds = 0, 0.0
            for query in queries:
                begun = time.perf_counter()
                found = find(shard, query, where, hnsw_ef=128, **params)
                seconds += time.perf_counter() - begun
                hits += len(found & find(shard, query, where, exact=True))
            told.append(f"{hits / (10 * len(queries)):.3f} in {seconds / len(queries) * 1000:.1f} ms")
        print(f"    {label}: recall@10 {told[0]}; with ACORN {told[1]}", flush=True)
    shard.close()


def main() -> None:
    """Every variant in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    vectors = make_vectors(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        load(base, vectors[: options.rows])
        for name in options.only:
            copy = Path(folder, "copy")
            shutil.copytree(base, copy)
            measure(copy, name, options.rows, vectors[options.rows :])
            shutil.rmtree(copy)


if __name__ == "__main__":
    main()
