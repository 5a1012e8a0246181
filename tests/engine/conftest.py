"""A product without Dagster and API: a catalog, a customer's table, a loopback provider, and the engine called directly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from embedd_dagster.catalog import (
    connections,
    embedding_providers,
    environments,
    failed_rows,
    tasks,
    vector_sets,
    vector_tables,
)
from embedd_dagster.catalog.live_tables import LiveTable, find_live
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.catalog.tables import Connection, Task, VectorSetRow, VectorTable
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.connectors.postgresql.pgvector.names import platform_vector_ref, view_name
from embedd_dagster.core.keys import decode_key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, Mode, SyncMode, VectorConfiguration
from embedd_dagster.engine.report import RunReport
from embedd_dagster.engine.run import run_task
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.search import Question, Searcher
from embedd_dagster.engine.task_run import RunOptions
from embedd_dagster.engine.teardown import teardown
from embedd_dagster.protocols.source import Selection
from embedd_dagster.protocols.store import Store
from embedd_dagster.settings import Settings
from tests.support.cdc_product import (
    RunningConsumer,
    consumer_of,
    eventually,
    is_subscribed,
    make_cdc,
    settled,
    slots_of,
)
from tests.support.openai_server import RunningServer, running_openai_server

DIMENSIONS = 16
PUBLIC = partial(platform_vector_ref, "public")
MODEL = "text-embedding-3-small"
COLUMNS = (
    Column("title", ColumnRole.EMBEDDING, ordinal=1, name_prefix="title: "),
    Column("body", ColumnRole.EMBEDDING, ordinal=2),
    Column("category", ColumnRole.METADATA, filter_type=FilterType.KEYWORD),
    Column("price", ColumnRole.METADATA, filter_type=FilterType.FLOAT),
)


@pytest.fixture(scope="session")
def openai_server() -> Iterator[RunningServer]:
    with running_openai_server() as server:
        yield server


@dataclass
class Product:
    """One vector table and everything around it."""

    runtime: Runtime
    provider: RunningServer
    database_url: str
    environment_id: str
    vector_table_id: str
    mode: Mode
    log: list[str] = field(default_factory=list)
    options: RunOptions = field(default_factory=RunOptions)

    def renew(self) -> None:
        """Another vector table over the same source, nothing built yet; the old one is torn down."""
        with self.runtime.catalog.transaction() as session:
            old = vector_tables.get(session, self.environment_id, self.vector_table_id, lock=True)
            configuration = VectorConfiguration("products", "id", COLUMNS, MODEL, DIMENSIONS, old.embedding_provider_id)
            new = NewVectorTable(
                uuid4().hex, old.connection_id, configuration, self.mode, SyncMode.BATCH, None, None, PUBLIC
            )
            environment = environments.get(session, old.org_id, old.environment_id)
            vector_tables.mark_deleted(old)
            made = vector_tables.create(session, environment, new)
        assert teardown(self.runtime, self.vector_table_id)
        self.vector_table_id = made.id

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters or None)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def add_task(self, task_type: TaskType = TaskType.BACKFILL, **options: Any) -> str:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.get(session, self.environment_id, self.vector_table_id, lock=True)
            return tasks.create(session, table, task_type, max_attempts=3, options=options).id

    def run(
        self,
        task_type: TaskType = TaskType.BACKFILL,
        *,
        run_id: str | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> RunReport:
        return self.run_task(self.add_task(task_type, **options), run_id=run_id, should_stop=should_stop)

    def run_task(
        self, task_id: str, *, run_id: str | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> RunReport:
        return run_task(
            self.runtime,
            task_id,
            run_id or uuid4().hex,
            log=self.log.append,
            should_stop=should_stop,
            options=self.options,
        )

    @contextmanager
    def caught(self, task_id: str) -> Iterator[Future[RunReport]]:
        """The task's run, which waits for its provider as long as the block lasts, and then goes on."""
        self.provider.behave(held=True)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.run_task, task_id)
            try:
                eventually(lambda: running.done() or self.provider.stats()["in_flight"] > 0)
                assert not running.done(), running.exception()
                yield running
            finally:
                self.provider.behave(held=False)

    def table(self) -> VectorTable:
        with self.runtime.catalog.transaction() as session:
            found = vector_tables.find(session, self.vector_table_id)
            assert found is not None
            return found

    def task(self, task_id: str) -> Task:
        with self.runtime.catalog.transaction() as session:
            found = tasks.find(session, task_id)
            assert found is not None
            return found

    def latest_task(self) -> Task:
        with self.runtime.catalog.transaction() as session:
            return tasks.page(session, self.environment_id, 1, None, target_id=self.vector_table_id, status=None).items[
                0
            ]

    def live_row(self) -> VectorSetRow:
        """The catalog's record of the live set."""
        with self.runtime.catalog.transaction() as session:
            return vector_sets.get(session, self.vector_table_id, self.table().live_version or 0)

    def live_set(self) -> VectorSet:
        return vector_sets.as_vector_set(self.live_row(), self.table().storage_name)

    def connection(self) -> Connection:
        with self.runtime.catalog.transaction() as session:
            endpoints = vector_tables.load_endpoints(session, self.vector_table_id)
        assert endpoints is not None
        return endpoints.connection

    def open_store(self) -> Store:
        return self.runtime.open_store(self.mode, self.connection())

    def reconfigure(
        self, *, columns: tuple[Column, ...] = COLUMNS, model: str = MODEL, dimensions: int = DIMENSIONS
    ) -> None:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.get(session, self.environment_id, self.vector_table_id, lock=True)
            vector_tables.reconfigure(table, columns=columns, embedding_model=model, embedding_dimensions=dimensions)

    def points(self) -> dict[Any, tuple[int, int]]:
        """Every live point: (row hash, text hash) by key."""
        live = self.live_set()
        with self.open_store() as store:
            prints = list(store.fingerprints(live, 0, None))
            hashes = store.vectors(live, [one.key for one in prints])
            # a writer may have been in between
            return {one.key: (one.row_hash, hashes[one.key][0]) for one in prints if one.key in hashes}

    def published_dimensions(self) -> int:
        """The dimensions of what the public name shows, as its users would find them."""
        name = self.table().storage_name
        if self.mode is Mode.PLATFORM:
            return int(self.sql(f'SELECT vector_dims(embedding) FROM "{view_name(name)}" LIMIT 1')[0][0])
        found = httpx.get(f"{self.runtime.settings.qdrant_url}/collections/{name}").raise_for_status().json()
        return int(found["result"]["config"]["params"]["vectors"]["size"])

    def failed_keys(self) -> list[Any]:
        """Keys of the rows that have failed, of the newest version."""
        with self.runtime.catalog.transaction() as session:
            return [decode_key(row.key) for row in failed_rows.page(session, self.vector_table_id, 500, None).items]

    def expected_points(self) -> dict[Any, int]:
        """The row hash of every row, computed by the source now."""
        configuration = self.table().configuration
        selection = Selection(configuration.source_table, configuration.primary_key_column, configuration.column_names)
        with self.runtime.open_source(self.connection()) as source:
            return {one.key: one.row_hash for one in source.reader(selection).fingerprints(0, None)}

    def assert_true_to_source(self, without: Collection[Any] = ()) -> None:
        """Every row but those without text or failed has a point made from its present state, and no other point is there."""
        expected = {key: row_hash for key, row_hash in self.expected_points().items() if key not in without}
        assert {key: row_hash for key, (row_hash, _text) in self.points().items()} == expected

    def search(self, query: str, **options: Any) -> list[Any]:
        def find() -> LiveTable:
            found = find_live(self.runtime.catalog, self.environment_id, self.vector_table_id)
            assert found is not None
            return found

        searcher = Searcher(self.runtime)
        try:
            return searcher.search(find(), Question(query, 10, **options), refresh=find).hits
        finally:
            searcher.close()


@pytest.fixture
def settings(database_url: str, qdrant_url: str) -> Settings:
    return Settings(
        database_url=SecretStr(database_url),
        encryption_keys=(SecretStr(new_encryption_key()),),
        qdrant_url=qdrant_url,
        heartbeat_seconds=0.2,
        retired_set_grace_seconds=0,
        outage_patience_seconds=20,
    )


@pytest.fixture(params=[Mode.MANAGED, Mode.PLATFORM], ids=["qdrant", "pgvector"])
def product(request: pytest.FixtureRequest, settings: Settings, openai_server: RunningServer) -> Iterator[Product]:
    """A vector table over 500 products, nothing built yet; the customer's tables are in the catalog's database."""
    openai_server.reset()
    url = settings.database_url.get_secret_value()
    upgrade(url)
    runtime = Runtime.open(settings)
    address = make_url(url)
    credentials = PostgresqlCredentials(
        host=address.host,
        port=address.port,
        database=address.database,
        user=address.username,
        password=address.password,
    ).model_dump()
    mode: Mode = request.param
    with runtime.catalog.transaction() as session:
        environment = environments.ensure_defaults(session)
        connection = connections.create(
            session,
            runtime.box,
            environment,
            name="c",
            provider="postgresql",
            mode=mode,
            credentials=credentials,
        )
        connections.record_test(connection, None)
        provider = embedding_providers.create(
            session,
            runtime.box,
            environment,
            name="p",
            provider="openai",
            credentials={"api_key": "sk-test", "base_url": openai_server.base_url},
            limits={"concurrency": 4},
        )
        session.flush()
        configuration = VectorConfiguration("products", "id", COLUMNS, MODEL, DIMENSIONS, provider.id)
        table = vector_tables.create(
            session,
            environment,
            NewVectorTable(
                f"products {uuid4().hex[:8]}",
                connection.id,
                configuration,
                mode,
                SyncMode.BATCH,
                platform_name=PUBLIC,
            ),
        )
    made = Product(runtime, openai_server, url, environment.id, table.id, mode)
    made.sql(
        """CREATE TABLE products (id integer PRIMARY KEY, title text, body text, category text, price numeric(10,2));
        INSERT INTO products SELECT n, 'product ' || n, 'the body of ' || n,
            (ARRAY['red', 'green', 'blue'])[n % 3 + 1], n / 10.0 FROM generate_series(1, 500) n"""
    )
    yield made
    runtime.close()


@pytest.fixture
def cdc_product(product: Product) -> Iterator[Product]:
    """A cdc table, nothing built yet."""
    make_cdc(product)
    product.runtime.settings.__dict__.update(follow_poll_seconds=0.05, follow_patience_seconds=1.5)
    yield product
    product.sql(
        """SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots
           WHERE database = current_database() AND active_pid IS NOT NULL"""
    )
    eventually(lambda: not slots_of(product) or _drop_slots(product))


def _drop_slots(product: Product) -> bool:
    product.sql(
        """SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
           WHERE database = current_database() AND NOT active"""
    )
    return not slots_of(product)


@pytest.fixture
def followed(cdc_product: Product) -> Iterator[tuple[Product, RunningConsumer]]:
    """A built CDC table with a running consumer and no pending resync."""
    cdc_product.run()
    with consumer_of(cdc_product) as consumer:
        eventually(lambda: is_subscribed(cdc_product) and settled(cdc_product))
        yield cdc_product, consumer
