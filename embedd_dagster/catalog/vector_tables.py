"""Vector tables: what should be, the state callers see, and the moves between states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, object_session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.conflicts import name_must_be_free, violated_constraint
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.tables import (
    CdcState,
    Connection,
    EmbeddingProvider,
    Environment,
    Task,
    VectorSetRow,
    VectorTable,
)
from embedd_dagster.core.status import LIVE_TASK_STATUSES, StatusFacts, SyncStatus, TaskType, status_of
from embedd_dagster.core.vector_table import Column, Mode, SyncMode, VectorConfiguration, storage_name
from embedd_dagster.errors import Conflict, EmbeddError, NotFound

_MAX_NAME_LENGTH = 255
_ID_ATTEMPTS = 20
_LIVE = tuple(status.value for status in LIVE_TASK_STATUSES)
_NAME_CONSTRAINTS = ("uq_vector_tables_storage_name", "uq_vector_tables_partition_key")
_REBUILD_CANCELLED = (
    "The re-backfill was cancelled, and does not begin again by itself. "
    "POST /v1/vector-tables/{id}/backfill starts it, and so does a new configuration."
)


@dataclass(frozen=True, slots=True)
class NewVectorTable:
    """A checked request for a vector table."""

    name: str
    connection_id: str
    configuration: VectorConfiguration
    mode: Mode
    sync_mode: SyncMode
    sync_schedule: str | None = None
    sync_interval_seconds: int | None = None
    platform_name: Callable[[str], str] | None = None
    """In platform mode: makes the name that users query from the name that the vector table is stored under."""
    max_name_length: int = _MAX_NAME_LENGTH
    """Of the name that it is stored under, in its store."""


def create(session: Session, environment: Environment, new: NewVectorTable) -> VectorTable:
    """A new vector table in status `pending`. Raises Conflict `name_conflict`."""
    for _attempt in range(_ID_ATTEMPTS):
        row = _new_row(environment, new, new_id("vt"))
        try:
            with name_must_be_free(session, "vector table", new.name):
                session.add(row)
        except IntegrityError as error:
            # the ids of two tables of one name, in two environments, begin with the same 8 characters: take another
            if violated_constraint(error) not in _NAME_CONSTRAINTS:
                raise
        else:
            return row
    raise EmbeddError(f"No name to store vector table {new.name!r} under is free.")


def _new_row(environment: Environment, new: NewVectorTable, vector_table_id: str) -> VectorTable:
    configuration = new.configuration
    public_name = storage_name(vector_table_id, new.name, max_length=new.max_name_length)
    return VectorTable(
        id=vector_table_id,
        org_id=environment.org_id,
        environment_id=environment.id,
        connection_id=new.connection_id,
        embedding_provider_id=configuration.embedding_provider_id,
        name=new.name,
        source_table=configuration.source_table,
        primary_key_column=configuration.primary_key_column,
        columns=[column.to_json() for column in configuration.columns],
        embedding_model=configuration.embedding_model,
        embedding_dimensions=configuration.embedding_dimensions,
        mode=new.mode.value,
        sync_mode=new.sync_mode.value,
        sync_schedule=new.sync_schedule,
        sync_interval_seconds=new.sync_interval_seconds,
        config_version=1,
        storage_name=public_name,
        partition_key=storage_name(vector_table_id, new.name, max_length=_MAX_NAME_LENGTH),
        platform_vector_ref=new.platform_name(public_name) if new.platform_name else None,
        sync_status=SyncStatus.PENDING.value,
        paused=False,
        has_failed=False,
        total_rows=0,
        synced_rows=0,
        cdc=CdcState(),
        created_at=now(),
        updated_at=now(),
    )


def get(session: Session, environment_id: str, vector_table_id: str, *, lock: bool = False) -> VectorTable:
    """The vector table. Raises NotFound, also for one of another environment or one that is being deleted."""
    row = session.get(VectorTable, vector_table_id, with_for_update=lock or None, populate_existing=lock)
    if row is None or row.environment_id != environment_id or row.deleted_at is not None:
        raise NotFound("vector_table", vector_table_id)
    return row


def find(session: Session, vector_table_id: str, *, lock: bool = False) -> VectorTable | None:
    """The vector table of any environment, deleted or not, or None."""
    return session.get(VectorTable, vector_table_id, with_for_update=lock or None, populate_existing=lock)


def page(
    session: Session,
    environment_id: str,
    limit: int,
    after: Position | None,
    *,
    name: str | None = None,
    sync_status: str | None = None,
    connection_id: str | None = None,
    source_table: str | None = None,
) -> Page[VectorTable]:
    """The environment's vector tables that have all of the given values, newest first."""
    statement = select(VectorTable).where(
        VectorTable.environment_id == environment_id, VectorTable.deleted_at.is_(None)
    )
    wanted = {
        VectorTable.name: name,
        VectorTable.sync_status: sync_status,
        VectorTable.connection_id: connection_id,
        VectorTable.source_table: source_table,
    }
    return fetch_page(session, having(statement, wanted), VectorTable, limit, after)


def rename(session: Session, row: VectorTable, name: str) -> None:
    """Another name; the vectors and the names they are stored under stay. Raises Conflict."""
    if name != row.name:
        with name_must_be_free(session, "vector table", name):
            row.name = name
            row.updated_at = now()


def reconfigure(
    row: VectorTable, *, columns: Sequence[Column], embedding_model: str, embedding_dimensions: int
) -> bool:
    """Takes a new configuration; True where it means another, and the vectors have to follow (`pending_rebackfill`).

    One that is only spelled otherwise, as with its columns in another order, is kept as it is given and asks for nothing. A
    table that never was live stays `pending`: its first backfill takes the new configuration.
    """
    wanted = ([column.to_json() for column in columns], embedding_model, embedding_dimensions)
    if wanted == (row.columns, row.embedding_model, row.embedding_dimensions):
        return False
    meaning = row.configuration.meaning
    row.columns, row.embedding_model, row.embedding_dimensions = wanted
    row.updated_at = now()
    if row.configuration.meaning == meaning:
        return False
    request_build(row)
    return True


def request_build(row: VectorTable) -> None:
    """The configuration has changed, so that a table with live vectors has to be built again."""
    allow_rebuild(row)
    row.config_version += 1
    if row.live_version is not None:
        row.has_failed = False
    _update_status(row)


def reschedule(row: VectorTable, schedule: str | None, interval_seconds: int | None) -> None:
    """Changes the schedule and computes the next sync. Does nothing if it is the same."""
    if (schedule, interval_seconds) != (row.sync_schedule, row.sync_interval_seconds):
        row.sync_schedule, row.sync_interval_seconds = schedule, interval_seconds
        row.next_sync_at = None
        row.updated_at = now()


def _facts_of(row: VectorTable) -> StatusFacts:
    """What the status follows from, in one query. The caller has locked the row."""
    session = object_session(row)
    if session is None:
        raise EmbeddError(f"Vector table {row.id} is changed outside of a transaction.")
    is_building = select(Task.id).where(
        Task.target_id == row.id, Task.status.in_(_LIVE), Task.task_type != TaskType.SYNC.value
    )
    live_config_version = select(VectorSetRow.config_version).where(
        VectorSetRow.vector_table_id == row.id, VectorSetRow.version == row.live_version
    )
    building, live = session.execute(select(is_building.exists(), live_config_version.scalar_subquery())).one()
    return StatusFacts(
        is_deleted=row.deleted_at is not None,
        is_building=building,
        is_paused=row.paused,
        has_failed=row.has_failed,
        config_version=row.config_version,
        live_config_version=live,
    )


def _update_status(row: VectorTable, facts: StatusFacts | None = None) -> None:
    """Writes `sync_status` as it follows from the facts; nothing else changes it. Idempotent."""
    status = status_of(replace(facts or _facts_of(row), has_failed=row.has_failed)).value
    if status != row.sync_status:
        row.sync_status, row.updated_at = status, now()


def record_error(session: Session, vector_table_ids: Collection[str], error: str) -> None:
    """Records what is wrong with vector tables that stay as they are. The next task that completes clears it."""
    session.execute(
        update(VectorTable)
        .where(VectorTable.id.in_(vector_table_ids), VectorTable.last_error.is_distinct_from(error))
        .values(last_error=error, last_error_at=now())
    )


def mark_failed(session: Session, vector_table_id: str, error: str) -> None:
    """A vector table cannot be kept in sync until a person acts; what is live stays live. Idempotent."""
    row = find(session, vector_table_id, lock=True)
    if row is None or row.deleted_at is not None or row.last_error == error:
        return
    row.last_error, row.last_error_at = error, now()
    if row.live_version is not None:
        row.has_failed = True
        _update_status(row)


def record_counts(
    session: Session, vector_table_id: str, version: int, point_count: int, failed_count: int, truncated_count: int
) -> None:
    """Records the rows and points of the live set, as a CDC consumer finds them between two syncs."""
    row = find(session, vector_table_id, lock=True)
    if row is not None and row.live_version == version:
        live = session.get_one(VectorSetRow, (vector_table_id, version))
        live.truncated_count = (live.truncated_count or 0) + truncated_count
        row.synced_rows = point_count
        row.total_rows = point_count + failed_count + (live.skipped_count or 0)


def begin_build(row: VectorTable) -> None:
    """A task that builds the vector table was created."""
    allow_rebuild(row)
    row.updated_at = now()
    _update_status(row)


def settle_status(row: VectorTable) -> None:
    """A build or a pause has ended: an error that is left makes the status `error`, unless a build is due."""
    facts = _facts_of(row)
    row.updated_at = now()
    row.has_failed = row.last_error is not None and not facts.is_outdated
    if facts.is_outdated and row.is_rebuild_suppressed and row.last_error is None and not row.paused:
        row.last_error, row.last_error_at = _REBUILD_CANCELLED, now()
    _update_status(row, facts)


def settle_failure(row: VectorTable, error: str, task_type: TaskType) -> None:
    """A task has failed for good. A failed sync does not keep a newer configuration from being built."""
    facts = _facts_of(row)
    row.last_error, row.last_error_at, row.updated_at = error, now(), now()
    row.has_failed = not (facts.is_outdated and task_type is TaskType.SYNC)
    _update_status(row, facts)


def suppress_rebuild(session: Session, row: VectorTable, config_version: int) -> None:
    """The build of this configuration was cancelled: unless it is live, only a request starts it again."""
    if row.live_version is None:
        return
    if session.get_one(VectorSetRow, (row.id, row.live_version)).config_version < config_version:
        row.not_rebuilt_version = config_version
        if row.is_rebuild_suppressed:
            row.last_error, row.last_error_at = _REBUILD_CANCELLED, now()


def allow_rebuild(row: VectorTable) -> None:
    """The build that was cancelled is requested again, or no longer wanted. Idempotent."""
    row.not_rebuilt_version = None
    if row.last_error == _REBUILD_CANCELLED:
        row.last_error = row.last_error_at = None


def clear_error(row: VectorTable) -> None:
    """A task has completed; a build that was cancelled stays so, with its message."""
    if row.last_error != _REBUILD_CANCELLED:
        row.last_error = row.last_error_at = None


def mark_deleted(row: VectorTable) -> None:
    """Gone for callers at once; the reconcile sensor removes the vectors."""
    row.deleted_at = now()
    _update_status(row)


def pause(row: VectorTable) -> None:
    """Nothing syncs or re-backfills by itself any more; queries go on. Raises Conflict `sync_already_paused`."""
    if row.paused:
        raise Conflict(
            f"Sync of {row.name!r} is already paused.", code="sync_already_paused", resolution="Nothing to do."
        )
    row.paused = True
    _update_status(row)


def resume(row: VectorTable) -> None:
    """Ends a pause; a failure before or during the pause is still an error. Raises Conflict `sync_not_paused`."""
    if not row.paused:
        raise Conflict(f"Sync of {row.name!r} is not paused.", code="sync_not_paused", resolution="Nothing to do.")
    row.paused = False
    settle_status(row)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """A vector table with what is needed to reach its source and its provider."""

    vector_table: VectorTable
    connection: Connection
    embedding_provider: EmbeddingProvider | None


def load_endpoints(session: Session, vector_table_id: str) -> Endpoints | None:
    """The vector table, its connection and its provider, in one query; None where it is gone."""
    found = session.execute(
        select(VectorTable, Connection, EmbeddingProvider)
        .join(Connection, Connection.id == VectorTable.connection_id)
        .outerjoin(EmbeddingProvider, EmbeddingProvider.id == VectorTable.embedding_provider_id)
        .where(VectorTable.id == vector_table_id)
    ).one_or_none()
    return None if found is None else Endpoints(*found)


def storage_places(session: Session, vector_table_ids: Collection[str]) -> dict[str, str]:
    """Where each is stored: by the id of its connection what lies in the source's database, all else in one managed store."""
    statement = select(VectorTable.id, VectorTable.mode, VectorTable.connection_id)
    found = session.execute(statement.where(VectorTable.id.in_(vector_table_ids)))
    return {key: connection_id if mode == Mode.PLATFORM.value else "managed" for key, mode, connection_id in found}


def remove(session: Session, vector_table_id: str) -> None:
    """Removes the record of a vector table whose storage is torn down. Idempotent."""
    row: Any = session.get(VectorTable, vector_table_id)
    if row is not None:
        session.delete(row)
