"""LangChain: `index()` with a SQLRecordManager into PGVector."""

import json
import os
import time

import psycopg
from langchain_classic.indexes import SQLRecordManager, index
from langchain_core.documents import Document
from langchain_openai import OpenAIEmbeddings
from langchain_postgres import PGVector

URL = os.environ["DATABASE_URL"]
ENGINE_URL = URL.replace("postgresql://", "postgresql+psycopg://")

begun = time.perf_counter()
embeddings = OpenAIEmbeddings(
    model="text-embedding-3-small", dimensions=384, chunk_size=500, check_embedding_ctx_length=False, api_key="sk-bench"
)
store = PGVector(
    embeddings, collection_name="bench", connection=ENGINE_URL, embedding_length=384, pre_delete_collection=True
)
records = SQLRecordManager("bench", db_url=ENGINE_URL)
records.create_schema()


def documents():
    with psycopg.connect(URL) as connection, connection.cursor(name="rows") as cursor:
        cursor.itersize = 2000
        cursor.execute(f"SELECT id, title, body, category, price::float8 FROM {os.environ['SOURCE_TABLE']} ORDER BY id")
        for key, title, body, category, price in cursor:
            yield Document(
                page_content=f"title: {title}\n{body}",
                metadata={"source": str(key), "category": category, "price": price},
            )


result = index(
    documents(), records, store, cleanup="full", source_id_key="source", batch_size=500, cleanup_batch_size=1000,
    key_encoder="sha256",
)  # fmt: skip
seconds = time.perf_counter() - begun
print(json.dumps({"rows": result["num_added"], "seconds": seconds, "what": "index(), batches of 500"}))
