"""A real catalog, and an ephemeral Dagster instance, on both sides of `defs`."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

import dagster as dg
import pytest
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from pydantic import SecretStr

from embedd_dagster.catalog import connections, environments, migrate, partitions, tasks, vector_sets, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import Task, VectorSetRow, VectorTable
from embedd_dagster.core.status import TaskType, VectorSetState
from embedd_dagster.core.vector_table import Column, ColumnRole, Mode, SyncMode, VectorConfiguration
from embedd_dagster.defs import resources
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import get_settings


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def runtime(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """The process's runtime, over a migrated catalog of this test alone."""
    migrate.upgrade(database_url)
    monkeypatch.setenv("EMBEDD_DATABASE_URL", database_url)
    monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", base64.b64encode(os.urandom(32)).decode())
    monkeypatch.setenv("EMBEDD_QDRANT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("EMBEDD_API_URL", "http://api.test")
    get_settings.cache_clear()
    resources._process_runtime.cache_clear()
    opened = resources._process_runtime()
    yield opened
    opened.close()
    resources._process_runtime.cache_clear()
    get_settings.cache_clear()


ORIGIN = RemoteJobOrigin(
    RemoteRepositoryOrigin(
        GrpcServerCodeLocationOrigin(host="localhost", port=1, location_name="embedd"), "__repository__"
    ),
    "vector_table_job",
)
"""Only a run with one may be queued."""


@dataclass
class Tables:
    """Vector tables as the API would leave them, and tasks in every state."""

    runtime: Runtime
    log: list[str] = field(default_factory=list)

    def create(self, name: str, *, live: bool = False, sync_schedule: str | None = None) -> str:
        with self.runtime.catalog.transaction() as session:
            environment = environments.ensure_defaults(session)
            connection = connections.create(
                session,
                self.runtime.box,
                environment,
                name=f"c-{name}",
                provider="postgresql",
                mode="managed",
                credentials={"host": "127.0.0.1", "password": SecretStr("p")},
            )
            configuration = VectorConfiguration("public.t", "id", (Column("a", ColumnRole.EMBEDDING),), "m", 3)
            session.flush()
            table = vector_tables.create(
                session,
                environment,
                vector_tables.NewVectorTable(
                    name, connection.id, configuration, Mode.MANAGED, SyncMode.BATCH, sync_schedule=sync_schedule
                ),
            )
            session.flush()
            if live:
                session.add(
                    VectorSetRow(
                        vector_table_id=table.id,
                        version=1,
                        state=VectorSetState.BUILDING.value,
                        config_version=1,
                        configuration=configuration.to_json(),
                        key_type="integer",
                        created_at=now(),
                    )
                )
                session.flush()
                vector_sets.mark_live(session, table, vector_sets.get(session, table.id, 1))
                table.sync_status = "synced"
            return table.id

    def reconfigure(self, vector_table_id: str, model: str = "other") -> None:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, vector_table_id)
            columns = [Column.from_json(column) for column in table.columns]
            vector_tables.reconfigure(table, columns=columns, embedding_model=model, embedding_dimensions=3)

    def delete(self, vector_table_id: str) -> None:
        with self.runtime.catalog.transaction() as session:
            vector_tables.mark_deleted(vector_tables.find(session, vector_table_id))

    def task(
        self, vector_table_id: str, task_type: TaskType = TaskType.BACKFILL, *, created_at: datetime | None = None
    ) -> str:
        with self.runtime.catalog.transaction() as session:
            made = tasks.create(session, vector_tables.find(session, vector_table_id), task_type, max_attempts=3)
            made.created_at = created_at or now().replace(year=2020)
            return made.id

    def claim(self, task_id: str, run_id: str, *, heartbeat_at: datetime | None = None) -> None:
        with self.runtime.catalog.transaction() as session:
            made = tasks.claim(session, task_id, run_id)
            made.heartbeat_at = heartbeat_at or now()

    def change_task(self, task_id: str, **values: object) -> None:
        with self.runtime.catalog.transaction() as session:
            made = tasks.find(session, task_id)
            for name, value in values.items():
                setattr(made, name, value)

    def change(self, vector_table_id: str, **values: object) -> None:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, vector_table_id)
            for name, value in values.items():
                setattr(table, name, value)

    def partition(self, vector_table_id: str) -> str:
        """The table's partition key; one that is unknown is given back."""
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, vector_table_id)
            return table.partition_key if table is not None else vector_table_id

    def of(self, partition_key: str) -> str:
        """The id of the vector table that has the partition."""
        with self.runtime.catalog.transaction() as session:
            return partitions.find_table(session, partition_key).id

    def __getitem__(self, vector_table_id: str) -> VectorTable:
        with self.runtime.catalog.transaction() as session:
            return vector_tables.find(session, vector_table_id)

    def get_task(self, task_id: str) -> Task:
        with self.runtime.catalog.transaction() as session:
            return tasks.find(session, task_id)

    def live_task(self, vector_table_id: str) -> Task | None:
        with self.runtime.catalog.transaction() as session:
            return tasks.find_live(session, vector_table_id)


@pytest.fixture
def tables(runtime: Runtime) -> Tables:
    return Tables(runtime)


@pytest.fixture
def make_run(instance: dg.DagsterInstance, tables: Tables) -> Callable[..., str]:
    """A record of a run of the job, in any state, without running anything."""
    from embedd_dagster.definitions import defs

    job = defs.resolve_job_def("vector_table_job")

    def make(status: dg.DagsterRunStatus, vector_table_id: str, task_id: str | None = None) -> str:
        tags = {"dagster/partition": tables.partition(vector_table_id)} | (
            {"embedd/task_id": task_id} if task_id else {}
        )
        queued = {"remote_job_origin": ORIGIN, "job_code_origin": None} if status is dg.DagsterRunStatus.QUEUED else {}
        run = instance.create_run_for_job(job, status=status, tags=tags, **queued)
        return run.run_id

    return make
