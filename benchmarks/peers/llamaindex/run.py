"""LlamaIndex: an `IngestionPipeline` into PGVectorStore; with DOCSTORE=1 one that knows what it has seen before."""

import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import Document, NodeRelationship, TextNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.vector_stores.postgres import PGVectorStore

URL = urlsplit(os.environ["DATABASE_URL"])
NAME = os.environ["TARGET"]
DOCSTORE = Path(os.environ["STATE_DIR"]) / "docstore.json" if os.environ.get("DOCSTORE") else None
NOT_EMBEDDED = ["category", "price"]


class OneNodeEach(TransformComponent):
    """A node for each document, with the reference to it by which its rows are deleted."""

    def __call__(self, nodes, **_options):
        return [
            TextNode(text=node.text, metadata=node.metadata, excluded_embed_metadata_keys=NOT_EMBEDDED,
                     relationships={NodeRelationship.SOURCE: node.as_related_node_info()})
            for node in nodes
        ]  # fmt: skip


def count():
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        there = connection.execute("SELECT to_regclass(%s)", [f"data_{NAME}"]).fetchone()[0]
        return connection.execute(f"SELECT count(*) FROM data_{NAME}").fetchone()[0] if there else 0


if sys.argv[1:] == ["count"]:
    print(json.dumps({"rows": count()}))
    sys.exit()
if sys.argv[1:] == ["drop"]:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        connection.execute(f"DROP TABLE IF EXISTS data_{NAME}")
    print(json.dumps({}))
    sys.exit()
begun = time.perf_counter()
store = PGVectorStore.from_params(
    host=URL.hostname, port=str(URL.port), database=URL.path[1:], user=URL.username, password=unquote(URL.password),
    table_name=NAME, embed_dim=384,
)  # fmt: skip
embedding = OpenAIEmbedding(
    model="text-embedding-3-small", dimensions=384, embed_batch_size=500, num_workers=4, api_key="sk-bench",
    api_base=os.environ["OPENAI_BASE_URL"],
)  # fmt: skip
with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
    rows = connection.execute(
        f"SELECT id, title, body, category, price::float8 FROM {os.environ['SOURCE_TABLE']}"
    ).fetchall()
documents = [
    Document(id_=str(key), text=f"title: {title}\n{body}", metadata={"category": category, "price": price},
             excluded_embed_metadata_keys=NOT_EMBEDDED)
    for key, title, body, category, price in rows
]  # fmt: skip
pipeline = IngestionPipeline(transformations=[OneNodeEach(), embedding], vector_store=store, disable_cache=True)
if DOCSTORE:
    pipeline.docstore = (
        SimpleDocumentStore.from_persist_path(str(DOCSTORE)) if DOCSTORE.exists() else SimpleDocumentStore()
    )
    pipeline.docstore_strategy = DocstoreStrategy.UPSERTS_AND_DELETE
pipeline.run(documents=documents)
if DOCSTORE:
    pipeline.docstore.persist(str(DOCSTORE))
seconds = time.perf_counter() - begun
what = f"IngestionPipeline, batches of 500, {'docstore' if DOCSTORE else 'no docstore'}, no cache"
print(json.dumps({"rows": count(), "seconds": seconds, "what": what}))
