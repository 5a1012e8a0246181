"""Databases that go silent in the middle of a read: given up if nobody works on it any more, waited for otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from embedd_dagster.connectors.registry import open_platform_store, open_source
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.errors import SourceUnavailable, VectorStoreUnavailable
from embedd_dagster.postgresql import BoundedConnection
from embedd_dagster.protocols.source import Selection
from tests.support.cdc_source import StreamReader, T, credentials_of
from tests.support.freezing_proxy import FreezingProxy, freezing_proxy

SILENCE = 0.5


@pytest.fixture
def proxy(database_url: str) -> Iterator[FreezingProxy]:
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'x' FROM generate_series(1, 9) g"
        )
        admin.execute("CREATE VIEW slow AS SELECT 1 AS id, pg_sleep(3)::text AS v")
    port = make_url(database_url).port
    assert port
    with freezing_proxy(port) as running:
        yield running


@pytest.fixture
def credentials(database_url: str, proxy: FreezingProxy) -> dict[str, Any]:
    return credentials_of(database_url, host="127.0.0.1", port=proxy.port)


@pytest.mark.parametrize("lets_others_through", [False, True])
def test_a_read_of_a_source_that_freezes_ends(
    proxy: FreezingProxy, credentials: dict[str, Any], *, lets_others_through: bool
) -> None:
    with open_source("postgresql", credentials, silence_seconds=SILENCE, connect_timeout_seconds=2) as source:
        reader = source.reader(Selection("t", "id", ("v",)))
        assert reader.count() == 9
        proxy.freeze_on = b"ORDER BY"
        frozen = reader.read(KeyRange(), page_rows=5, page_bytes=999)
        if lets_others_through:
            proxy.thaw_by_itself = True
        with pytest.raises(SourceUnavailable):
            list(frozen)


def test_a_long_statement_of_a_server_that_works_is_waited_for(credentials: dict[str, Any]) -> None:
    with open_source("postgresql", credentials, silence_seconds=SILENCE) as source:
        assert source.reader(Selection("slow", "id", ("v",))).digest(4).row_count == 1


def test_a_statement_that_ends_while_the_server_is_asked_about_it_is_not_given_up(database_url: str) -> None:
    class Connection(BoundedConnection):
        longest_silence = 0.2

        def is_still_working(self) -> bool:
            time.sleep(1.5)  # by then the statement has ended, and so the server does not work on it any more
            return False

    with Connection.connect(database_url) as connection:
        assert connection.execute("SELECT 1, pg_sleep(1)").fetchone() == (1, "")


def test_a_feed_that_freezes_ends(proxy: FreezingProxy, credentials: dict[str, Any]) -> None:
    with open_source("postgresql", credentials, silence_seconds=SILENCE, connect_timeout_seconds=2) as source:
        with source.cdc_stream("embedd_frozen") as feed:
            stream_reader = StreamReader(feed, T)
            stream_reader.subscribe()
            proxy.freeze()
            with pytest.raises(SourceUnavailable):
                stream_reader.read()
            proxy.thaw()
            feed.drop()


def test_a_platform_store_that_freezes_ends(proxy: FreezingProxy, credentials: dict[str, Any]) -> None:
    vector_set = VectorSet("vt_" + "b" * 26, 1, "vt_bbbbbbbb_t", 4, {}, "integer")
    with open_platform_store("postgresql", credentials, silence_seconds=SILENCE) as store:
        store.create(vector_set)
        proxy.freeze_on = b"count(*)"
        with pytest.raises(VectorStoreUnavailable):
            store.count(vector_set)
