"""The engine as a run uses it, called directly: everything but Dagster's own start of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from uuid import uuid4

from pydantic import SecretStr
from sqlalchemy import make_url

from benchmarks.data import TABLE
from benchmarks.servers import ROOT, Servers
from embedd_dagster.catalog import connections, embedding_providers, environments, tasks, vector_tables
from embedd_dagster.catalog.migrate import upgrade
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.catalog.vector_tables import NewVectorTable
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.connectors.postgresql.pgvector import indexes as pgvector_index
from embedd_dagster.connectors.postgresql.pgvector.names import platform_vector_ref
from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore
from embedd_dagster.connectors.qdrant.store import QdrantStore
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, Mode, SyncMode, VectorConfiguration
from embedd_dagster.engine.report import RunReport
from embedd_dagster.engine.run import run_task
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.teardown import teardown
from embedd_dagster.settings import Settings

COLUMNS = (
    Column("title", ColumnRole.EMBEDDING, ordinal=1, name_prefix="title: "),
    Column("body", ColumnRole.EMBEDDING, ordinal=2),
    Column("category", ColumnRole.METADATA, filter_type=FilterType.KEYWORD),
    Column("price", ColumnRole.METADATA, filter_type=FilterType.FLOAT),
)

PUBLIC = partial(platform_vector_ref, "public")


class Run(NamedTuple):
    """What a run reported, and how long it took from its claim to its end, and to the first row."""

    report: RunReport
    seconds: float
    start_seconds: float

    @property
    def load_rate(self) -> float:
        """Rows per second of the load alone."""
        return self.report.rows_read / self.report.seconds["load"]


class Bench:
    """A vector table over the benchmark's data, with a catalog in the same database."""

    def __init__(
        self,
        servers: Servers,
        mode: Mode,
        dimensions: int,
        *,
        source_table: str = TABLE,
        columns: tuple[Column, ...] = COLUMNS,
        sync_mode: SyncMode = SyncMode.BATCH,
        **limits: int,
    ) -> None:
        database_url, qdrant_url, base_url = servers.database_url, servers.qdrant_url, servers.provider.base_url
        upgrade(database_url)
        settings = Settings(
            database_url=SecretStr(database_url),
            encryption_keys=(SecretStr(new_encryption_key()),),
            qdrant_url=qdrant_url,
            qdrant_grpc_port=servers.qdrant_grpc_port,
            retired_set_grace_seconds=0,
        )
        self.runtime = Runtime.open(settings)
        address = make_url(database_url)
        credentials = PostgresqlCredentials(
            host=address.host,
            port=address.port,
            database=address.database,
            user=address.username,
            password=address.password,
        ).model_dump()
        with self.runtime.catalog.transaction() as session:
            environment = environments.ensure_defaults(session)
            name = uuid4().hex
            connection = connections.create(
                session,
                self.runtime.box,
                environment,
                name=name,
                provider="postgresql",
                mode=mode,
                credentials=credentials,
            )
            provider = embedding_providers.create(
                session,
                self.runtime.box,
                environment,
                name=name,
                provider="openai",
                credentials={"api_key": "sk-bench", "base_url": base_url},
                limits=limits,
            )
            session.flush()
            configuration = VectorConfiguration(
                source_table, "id", columns, "text-embedding-3-small", dimensions, provider.id
            )
            self.vector_table_id = vector_tables.create(
                session,
                environment,
                NewVectorTable(
                    name,
                    connection.id,
                    configuration,
                    mode,
                    sync_mode,
                    platform_name=PUBLIC,
                ),
            ).id
        self.environment_id = environment.id
        self.connection_id = connection.id

    def add_task(self, task_type: TaskType = TaskType.BACKFILL, *, max_attempts: int = 1, **options: object) -> str:
        """A task as the API would write it."""
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.get(session, self.environment_id, self.vector_table_id, lock=True)
            return tasks.create(session, table, task_type, max_attempts=max_attempts, options=options).id

    def run(self, task_type: TaskType = TaskType.BACKFILL, *, task_id: str | None = None, **options: object) -> Run:
        """One task from claim to end."""
        task_id = task_id or self.add_task(task_type, **options)
        stages: dict[str, float] = {}
        begun = time.perf_counter()

        def log(message: str) -> None:
            if message.startswith("Stage "):
                stages.setdefault(message.split()[1], time.perf_counter() - begun)

        report = run_task(self.runtime, task_id, uuid4().hex, log=log, should_stop=lambda: False)
        return Run(report, time.perf_counter() - begun, stages.get("load", 0.0))

    def environment(self) -> dict[str, str]:
        """What another process needs to work on the same catalog."""
        settings = self.runtime.settings
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "EMBEDD_DATABASE_URL": settings.database_url.get_secret_value(),
            "EMBEDD_ENCRYPTION_KEYS": settings.encryption_keys[0].get_secret_value(),
            "EMBEDD_QDRANT_URL": settings.qdrant_url,
            "EMBEDD_QDRANT_GRPC_PORT": str(settings.qdrant_grpc_port),
        }

    def close(self) -> None:
        """The vector table is gone, and everything given back."""
        with self.runtime.catalog.transaction() as session:
            vector_tables.mark_deleted(vector_tables.get(session, self.environment_id, self.vector_table_id, lock=True))
        teardown(self.runtime, self.vector_table_id)
        self.runtime.close()


@contextmanager
def without_index() -> Iterator[None]:
    """Backfills end without their index: for what is measured of the load alone, or of tables too large for this machine."""
    kept = PgvectorStore.finish_load, QdrantStore.finish_load
    PgvectorStore.finish_load = QdrantStore.finish_load = lambda *_args: None
    try:
        yield
    finally:
        PgvectorStore.finish_load, QdrantStore.finish_load = kept


def leave_out_hnsw() -> None:
    """From now on this process builds every index of a pgvector set but that over the vectors."""
    pgvector_index._MAX_HALFVEC = 0
