"""LlamaIndex: an `IngestionPipeline` into PGVectorStore."""

import json
import os
import time
from urllib.parse import unquote, urlsplit

import psycopg
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.vector_stores.postgres import PGVectorStore

URL = urlsplit(os.environ["DATABASE_URL"])

begun = time.perf_counter()
store = PGVectorStore.from_params(
    host=URL.hostname, port=str(URL.port), database=URL.path[1:], user=URL.username, password=unquote(URL.password),
    table_name="bench_llamaindex", embed_dim=384,
)  # fmt: skip
embedding = OpenAIEmbedding(
    model="text-embedding-3-small", dimensions=384, embed_batch_size=500, num_workers=4, api_key="sk-bench",
    api_base=os.environ["OPENAI_BASE_URL"],
)  # fmt: skip
with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
    rows = connection.execute(
        f"SELECT id, title, body, category, price::float8 FROM {os.environ['SOURCE_TABLE']}"
    ).fetchall()
nodes = [
    TextNode(id_=str(key), text=f"title: {title}\n{body}", metadata={"category": category, "price": price},
             excluded_embed_metadata_keys=["category", "price"])
    for key, title, body, category, price in rows
]  # fmt: skip
pipeline = IngestionPipeline(transformations=[embedding], vector_store=store, disable_cache=True)
done = pipeline.run(nodes=nodes)
seconds = time.perf_counter() - begun
print(
    json.dumps(
        {"rows": len(done), "seconds": seconds, "what": "IngestionPipeline, batches of 500, no docstore, no cache"}
    )
)
