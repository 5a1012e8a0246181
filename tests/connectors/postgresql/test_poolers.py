"""Sources and stores behind a pooler: the sessions that other clients share with us are left as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import URL, make_url

from embedd_dagster.connectors.registry import open_platform_store, open_source
from embedd_dagster.core.filters import parse_filter
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import SourceRejected
from embedd_dagster.protocols.source import Selection
from embedd_dagster.protocols.store import SearchRequest
from tests.support.followed_source import T, credentials_of
from tests.support.pgbouncer import needs_pgbouncer, pgbouncer

pytestmark = needs_pgbouncer


@pytest.fixture
def target(database_url: str) -> URL:
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'x' FROM generate_series(1, 300) g"
        )
        admin.execute("CREATE TABLE written (id int)")
    return make_url(database_url)


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


class Client:
    """Another client of the same pooler."""

    def __init__(self, url: URL) -> None:
        self.connection = psycopg.connect(
            text_of(url), autocommit=True, prepare_threshold=None, application_name="shop"
        )
        self.connection.execute("LOAD 'vector'")  # which adds its settings to the session, also by any use of a vector
        self.before = self.settings()

    def settings(self) -> dict[str, Any]:
        shown = {row[0]: row[1] for row in self.connection.execute("SHOW ALL").fetchall()}
        return {**shown, "prepared": self.left_behind("pg_prepared_statements")}

    def left_behind(self, view: str) -> Any:
        return self.connection.execute(f"SELECT count(*) FROM {view}").fetchall()[0][0]

    def require_undisturbed(self) -> None:
        assert self.settings() == self.before
        self.connection.execute("INSERT INTO written VALUES (1)")


def read_everything(url: URL) -> None:
    with open_source("postgresql", credentials_of(text_of(url))) as source:
        source.check()
        assert {table.name for table in source.tables(10)} >= {"t"}
        source.describe("t")
        source.check_key("t", "id")
        reader = source.reader(Selection("t", "id", ("v",)))
        assert reader.count() == 300
        pages = list(reader.read(KeyRange(), page_rows=100, page_bytes=2**20))
        assert [len(page) for page in pages if page] == [100, 100, 100]
        assert reader.digest(4).row_count == 300
        assert len(list(reader.fingerprints(4, None))) == 300
        assert sum(len(page) for page in reader.read_keys([1, 2], page_bytes=2**20)) == 2


def use_the_store(url: URL) -> None:
    vector_set = VectorSet("vt_" + "a" * 26, 1, "vt_aaaaaaaa_t", 4, {"color": FilterType.KEYWORD}, "integer")
    vectors = np.eye(4, dtype=np.float32)
    points = PointBatch([1, 2, 3, 4], ["x"] * 4, [{"color": "red"}] * 4, [1] * 4, [2] * 4, [0, 1, 2, 3], vectors)
    with open_platform_store("postgresql", credentials_of(text_of(url))) as store:
        store.check()
        store.create(vector_set)
        store.upsert(vector_set, points)
        store.upsert(vector_set, points)
        store.finish_load(vector_set)
        store.publish(vector_set)
        filters = parse_filter({"color": "red"}, vector_set.filter_types)
        assert [hit.key for hit in store.search(vector_set, SearchRequest(vectors[2], limit=1, filter=filters))] == [3]
        assert len(list(store.fingerprints(vector_set, 4, None))) == 4
        assert len(store.vectors(vector_set, [1, 2])) == 2
        store.delete(vector_set, [1])
        assert store.count(vector_set) == 3
        store.info(vector_set)
        store.drop_public_name(vector_set.vector_table_id, vector_set.public_name)
        store.drop(vector_set.vector_table_id, 1)


@pytest.mark.parametrize("use", [read_everything, use_the_store])
def test_a_session_shared_in_transaction_mode_is_left_as_it_was(target: URL, use: Any) -> None:
    with pgbouncer(target, "transaction") as url:
        client = Client(url)
        use(url)
        client.require_undisturbed()
        client.connection.close()


def test_a_pooler_in_session_mode_works(target: URL) -> None:
    with pgbouncer(target, "session", pool_size=10) as url:
        read_everything(url)
        use_the_store(url)
        with open_source("postgresql", credentials_of(text_of(url))) as source:
            source.check_cdc_eligible(T)


@pytest.mark.parametrize("pool_size", [1, 3])
def test_following_through_transaction_mode_is_refused_with_the_direct_port(target: URL, pool_size: int) -> None:
    with pgbouncer(target, "transaction", pool_size=pool_size) as url:
        client = Client(url)
        with open_source("postgresql", credentials_of(text_of(url))) as source:
            with pytest.raises(SourceRejected, match="pooler") as caught:
                source.check_cdc_eligible(T)
            assert f"port {target.port}" in caught.value.resolution
            with source.cdc_stream("embedd_pooled") as feed:
                with pytest.raises(SourceRejected, match="pooler"):
                    feed.subscribe([T], None, {})
        client.require_undisturbed()
        client.connection.close()
