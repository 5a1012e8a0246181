"""pgai's vectorizer worker, without the extension: batches of 500, concurrency 4, one chunk a row."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psycopg

URL, TABLE = os.environ["DATABASE_URL"], os.environ["SOURCE_TABLE"]
PGAI = str(Path(sys.executable).with_name("pgai"))
NAME = os.environ["TARGET"]
# the worker would download its tokenizer; litellm, which comes with it, has the same file under the name tiktoken looks for
LITELLM = Path(importlib.util.find_spec("litellm").submodule_search_locations[0])
os.environ["TIKTOKEN_CACHE_DIR"] = str(LITELLM / "litellm_core_utils" / "tokenizers")


def count(connection):
    """The rows of the target, which is made by the worker."""
    for table in (f"{NAME}_store", NAME):
        if connection.execute("SELECT to_regclass(%s)", [table]).fetchone()[0]:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return 0


with psycopg.connect(URL, autocommit=True) as connection:
    if sys.argv[1:] == ["count"]:
        print(json.dumps({"rows": count(connection)}))
        sys.exit()
    if sys.argv[1:] == ["drop"]:
        connection.execute("SELECT ai.drop_vectorizer(id, drop_all => true) FROM ai.vectorizer WHERE name = %s", [NAME])
        print(json.dumps({}))
        sys.exit()
    subprocess.run([PGAI, "install", "-d", URL], check=True, stdout=sys.stderr)
    found = connection.execute("SELECT id FROM ai.vectorizer WHERE name = %s", [NAME]).fetchone()
    vectorizer, *_ = (
        found
        or connection.execute(
            f"""SELECT ai.create_vectorizer('{TABLE}'::regclass, name => '{NAME}',
        loading => ai.loading_column('body'),
        destination => ai.destination_table('{NAME}'),
        embedding => ai.embedding_openai('text-embedding-3-small', 384, base_url => '{os.environ["OPENAI_BASE_URL"]}'),
        chunking => ai.chunking_none(), formatting => ai.formatting_python_template('title: $title\n$chunk'),
        indexing => ai.indexing_none(), scheduling => ai.scheduling_none(),
        processing => ai.processing_default(batch_size => 500, concurrency => 4))"""
        ).fetchone()
    )
    begun = time.perf_counter()
    subprocess.run(
        [PGAI, "vectorizer", "worker", "-d", URL, "-i", str(vectorizer), "--once", "-c", "4"],
        check=True,
        stdout=sys.stderr,
    )
    seconds = time.perf_counter() - begun
    rows = count(connection)
what = "vectorizer worker, batches of 500, concurrency 4; the start of its process counted"
print(json.dumps({"rows": rows, "seconds": seconds, "what": what}))
