"""Somebody else's functions, operators, types, views and casts, of all of PostgreSQL's names, where the role searches first.

None of them may run with the rights of our role (CVE-2018-1058). Each raises when it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest

from embedd_dagster.connectors.registry import open_platform_store, open_source
from embedd_dagster.core.filters import parse_filter
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import Selection
from embedd_dagster.protocols.store import SearchRequest
from tests.support.followed_source import Follower, credentials_of
from tests.support.hostile_names import plant


@pytest.fixture
def credentials(database_url: str) -> Iterator[dict[str, Any]]:
    """Of a role that searches a schema of its name and `public`, both full of hostile names, before PostgreSQL's own."""
    role = f"victim_{uuid4().hex[:8]}"
    with psycopg.connect(database_url, autocommit=True) as admin:
        database = admin.info.dbname
        admin.execute(f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'word'; CREATE SCHEMA {role}")
        admin.execute(f'ALTER ROLE {role} SET search_path = "$user", public, pg_catalog')
        admin.execute(f"GRANT ALL ON DATABASE {database} TO {role}; GRANT ALL ON SCHEMA {role}, public TO {role}")
        admin.execute("CREATE EXTENSION vector SCHEMA public; CREATE EXTENSION citext SCHEMA public")
        admin.execute("CREATE TYPE public.mood AS ENUM ('good', 'bad')")
        admin.execute("CREATE TABLE public.t (id int PRIMARY KEY, v text, moods public.mood[], n numeric)")
        admin.execute("INSERT INTO public.t SELECT g, 'x', '{good,bad}', g FROM generate_series(1, 9000) g")
        admin.execute(
            "CREATE TABLE public.e (id public.mood PRIMARY KEY, v text); INSERT INTO public.e VALUES ('bad', 'x')"
        )
        admin.execute(
            "CREATE TABLE public.c (id public.citext PRIMARY KEY, v text); INSERT INTO public.c VALUES ('A', 'x')"
        )
        admin.execute("CREATE VIEW public.w AS SELECT id, v FROM public.t WHERE id < 50")
        admin.execute(f"GRANT SELECT ON public.w TO {role}; ANALYZE public.t")
        for table in "tec":
            admin.execute(f"ALTER TABLE public.{table} OWNER TO {role}")
        plant(admin, ["public", role], enums=[("public", "mood")])
        with pytest.raises(psycopg.Error, match="hijacked"):
            psycopg.connect(database_url, user=role, password="word").execute("SELECT 1 = 1")
        try:
            yield credentials_of(database_url, user=role, password="word")
        finally:
            admin.execute(f"DROP OWNED BY {role} CASCADE; DROP SCHEMA {role} CASCADE; DROP ROLE {role}")


def test_no_name_of_a_source_s_statements_is_hijacked(credentials: dict[str, Any]) -> None:
    keys: dict[str, list[Any]] = {"t": [1, 2], "e": ["bad"], "c": ["A"], "w": [1, 2]}
    columns = {"t": ("v", "moods", "n")}
    with open_source("postgresql", credentials) as source:
        source.check()
        assert {table.name for table in source.tables(1000)} >= {"t", "e", "c", "w"}
        for table, some in keys.items():
            source.describe(table)
            source.check_key(table, "id")
            reader = source.reader(Selection(table, "id", columns.get(table, ("v",))))
            count = reader.count()
            ranges = [*reader.split(4), KeyRange(some[0], None)]
            rows = [
                row
                for one in ranges[:-1]
                for page in reader.read(one, page_rows=5000, page_bytes=2**22)
                for row in page
            ]
            assert len(rows) == count
            list(reader.read(ranges[-1], page_rows=5000, page_bytes=2**22))
            assert [row.key for page in reader.read_keys(some, page_bytes=2**22) for row in page] == some
            assert reader.digest(4).row_count == count
            assert len(list(reader.fingerprints(4, None))) == count
            list(reader.fingerprints(4, [1, 2, 3]))


def test_no_name_of_a_feed_s_statements_is_hijacked(credentials: dict[str, Any], database_url: str) -> None:
    followed = CdcTable("t", "id")
    with open_source("postgresql", credentials) as source, source.cdc_stream(f"embedd_{uuid4().hex[:8]}") as feed:
        source.check_cdc_eligible(followed)
        follower = Follower(feed, followed)
        try:
            assert follower.subscribe().newly_subscribed == {followed}
            with psycopg.connect(database_url, autocommit=True, options="-c search_path=pg_catalog") as admin:
                admin.execute("INSERT INTO public.t VALUES (20000, 'y')")
            assert follower.keys(followed) == [20000]
            follower.subscribe()
            assert feed.lag() is not None
        finally:
            feed.drop()


@pytest.mark.parametrize("key_type", ["integer", "public.mood", "public.citext"])
def test_no_name_of_a_store_s_statements_is_hijacked(credentials: dict[str, Any], key_type: str) -> None:
    types = {
        "color": FilterType.KEYWORD,
        "price": FilterType.FLOAT,
        "size": FilterType.INTEGER,
        "new": FilterType.BOOLEAN,
    }
    keys: list[Any] = [1, 2] if key_type == "integer" else ["good", "bad"]
    metadata: list[dict[str, Any]] = [{"color": "red", "price": 1.5, "size": 3, "new": True}] * 2
    filters = {"color": "red", "price": {"gte": 1}, "size": {"in": [3, 4]}, "new": {"neq": False}}
    with open_platform_store("postgresql", credentials) as store:
        store.check()
        for dimensions in (4, 2500):
            vector_table_id = f"vt_{uuid4().hex[:26]}"
            vector_set = VectorSet(vector_table_id, 1, f"{vector_table_id[:11]}_x", dimensions, types, key_type)
            vectors = np.ones((2, dimensions), dtype=np.float32)
            vectors[1, 0] = -1
            points = PointBatch(keys, ["x"] * 2, metadata, [1] * 2, [2] * 2, [0, 1], vectors)
            store.create(vector_set)
            store.upsert(vector_set, points)
            store.upsert(vector_set, points)
            store.finish_load(vector_set)
            store.publish(vector_set)
            tree = parse_filter(filters, types)
            assert store.search(vector_set, SearchRequest(vectors[1], limit=1))[0].key == keys[1]
            assert store.search(vector_set, SearchRequest(vectors[1], limit=1, filter=tree))[0].key == keys[1]
            assert len(list(store.fingerprints(vector_set, 4, None))) == 2
            list(store.fingerprints(vector_set, 4, [0, 5]))
            assert store.vectors(vector_set, keys).keys() == set(keys)
            store.delete(vector_set, keys[:1])
            assert store.count(vector_set) == 1
            store.info(vector_set)
            assert store.versions(vector_table_id) == [1]
            store.drop_public_name(vector_table_id, vector_set.public_name)
            store.drop(vector_table_id, 1)
