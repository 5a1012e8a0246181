"""A database with a table to follow, and a feed of it."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest

from embedd_dagster.connectors.postgresql.cdc.options import StreamOptions
from embedd_dagster.connectors.postgresql.source import PostgresSource
from embedd_dagster.protocols.cdc import CdcStream
from embedd_dagster.protocols.source import Source
from tests.support.cdc_source import (
    Admin,
    StreamReader,
    T,
    credentials_of,
)


@pytest.fixture
def admin(database_url: str) -> Iterator[Admin]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def writer(database_url: str) -> Iterator[Admin]:
    """Another session, for transactions that stay open."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def stream_options() -> StreamOptions:
    """The options of `feed`: parametrize it to change them."""
    return StreamOptions()


@pytest.fixture
def source(database_url: str, stream_options: StreamOptions) -> Iterator[Source]:
    with PostgresSource(credentials_of(database_url), statement_timeout_seconds=3600) as opened:
        opened.stream_options = stream_options
        yield opened


@pytest.fixture
def name() -> str:
    return f"embedd_{uuid4().hex[:8]}"


@pytest.fixture
def feed(source: Source, name: str) -> Iterator[CdcStream]:
    with source.cdc_stream(name) as opened:
        yield opened


@pytest.fixture
def table(admin: Admin) -> None:
    """`t`, with rows 1 to 3."""
    admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    admin.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3) g")


@pytest.fixture
def stream_reader(feed: CdcStream, table: None) -> StreamReader:
    """Of `t`, attached, with nothing to read."""
    made = StreamReader(feed, T)
    subscription = made.subscribe()
    assert subscription.newly_subscribed == {T}
    assert not subscription.rejected
    assert subscription.lost is None
    return made
