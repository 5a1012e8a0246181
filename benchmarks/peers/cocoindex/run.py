"""CocoIndex 1: a component a row, embedding in batches of its own function, into a PostgreSQL table target."""

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import asyncpg
import cocoindex as coco
import numpy as np
from cocoindex.connectors import postgres
from cocoindex.resources.schema import VectorSchema
from numpy.typing import NDArray
from openai import AsyncOpenAI

URL = os.environ["DATABASE_URL"]
NAME = os.environ["TARGET"]
PG = coco.ContextKey[asyncpg.Pool]("bench_pg")
client = AsyncOpenAI(api_key="sk-bench", base_url=os.environ["OPENAI_BASE_URL"])


@dataclass
class Row:
    id: int
    text: str
    category: str
    price: float
    embedding: Annotated[NDArray, VectorSchema(np.dtype(np.float32), 384)]


@coco.lifespan
async def lifespan(builder: coco.EnvironmentBuilder):
    builder.settings.db_path = Path(os.environ["STATE_DIR"]) / "coco.db"
    async with asyncpg.create_pool(URL) as pool:
        builder.provide(PG, pool)
        yield


@coco.fn.as_async(batching=True, max_batch_size=500)
async def embed(texts: list[str]) -> list[NDArray]:
    answer = await client.embeddings.create(model="text-embedding-3-small", input=texts, dimensions=384)
    return [np.asarray(item.embedding, dtype=np.float32) for item in answer.data]


@coco.fn(memo=True)
async def process(row: dict, target: postgres.TableTarget[Row]) -> None:
    text = f"title: {row['title']}\n{row['body']}"
    vector = await embed(text)
    target.declare_row(row=Row(row["id"], text, row["category"], float(row["price"]), vector))


@coco.fn
async def main() -> None:
    target = await postgres.mount_table_target(PG, NAME, await postgres.TableSchema.from_class(Row, ["id"]))
    source = postgres.PgTableSource(
        coco.use_context(PG),
        table_name=os.environ["SOURCE_TABLE"],
        columns=["id", "title", "body", "category", "price"],
    )
    await coco.mount_each(process, source.fetch_rows().items(key=lambda row: row["id"]), target)


async def ask(statement: str):
    connection = await asyncpg.connect(URL)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def count() -> int:
    there = await ask(f"SELECT to_regclass('{NAME}')")
    return await ask(f"SELECT count(*) FROM {NAME}") if there else 0


if sys.argv[1:] == ["count"]:
    print(json.dumps({"rows": asyncio.run(count())}))
    sys.exit()
if sys.argv[1:] == ["drop"]:
    asyncio.run(ask(f"DROP TABLE IF EXISTS {NAME}"))
    print(json.dumps({}))
    sys.exit()
begun = time.perf_counter()
coco.App(coco.AppConfig(name="bench"), main).update_blocking()
seconds = time.perf_counter() - begun
print(json.dumps({"rows": asyncio.run(count()), "seconds": seconds, "what": "batches of at most 500"}))
