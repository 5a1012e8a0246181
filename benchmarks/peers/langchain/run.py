"""LangChain: `index()` with a SQLRecordManager into PGVector."""

import json
import os
import sys
import time

import psycopg
from langchain_classic.indexes import SQLRecordManager, index
from langchain_core.documents import Document
from langchain_openai import OpenAIEmbeddings
from langchain_postgres import PGVector

URL = os.environ["DATABASE_URL"]
ENGINE_URL = URL.replace("postgresql://", "postgresql+psycopg://")
NAME = os.environ["TARGET"]
TABLES = "langchain_pg_embedding, langchain_pg_collection"
COUNT = """SELECT count(*) FROM langchain_pg_embedding e JOIN langchain_pg_collection c ON c.uuid = e.collection_id
    WHERE c.name = %s"""


def count():
    with psycopg.connect(URL) as connection:
        there = connection.execute("SELECT to_regclass('langchain_pg_embedding')").fetchone()[0]
        return connection.execute(COUNT, [NAME]).fetchone()[0] if there else 0


if sys.argv[1:] == ["count"]:
    print(json.dumps({"rows": count()}))
    sys.exit()
if sys.argv[1:] == ["drop"]:  # the tables too: equal documents of two collections share a row
    with psycopg.connect(URL) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {TABLES}")
    print(json.dumps({}))
    sys.exit()
begun = time.perf_counter()
embeddings = OpenAIEmbeddings(
    model="text-embedding-3-small", dimensions=384, chunk_size=500, check_embedding_ctx_length=False, api_key="sk-bench"
)
store = PGVector(embeddings, collection_name=NAME, connection=ENGINE_URL, embedding_length=384)
records = SQLRecordManager(NAME, db_url=ENGINE_URL)
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


index(
    documents(), records, store, cleanup="full", source_id_key="source", batch_size=500, cleanup_batch_size=1000,
    key_encoder="sha256",
)  # fmt: skip
seconds = time.perf_counter() - begun
print(json.dumps({"rows": count(), "seconds": seconds, "what": "index(), batches of 500"}))
