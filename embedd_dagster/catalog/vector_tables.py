"""Vector tables: what should be, the state callers see, and the moves between states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.conflicts import name_must_be_free, violated_constraint
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider, Environment, Task, VectorSetRow, VectorTable
from embedd_dagster.core.status import LIVE_TASK_STATUSES, SYNC_STATUS_MOVES, SyncStatus
from embedd_dagster.core.vector_table import Column, Mode, SyncMode, VectorConfiguration, storage_name
from embedd_dagster.errors import Conflict, EmbeddError, NotFound

_MAX_NAME_LENGTH = 255
_ID_ATTEMPTS = 20
_NAME_CONSTRAINTS = ("uq_vector_tables_storage_name", "uq_vector_tables_partition_key")
_HELD = (
    "The re-backfill was cancelled, and does not begin again by itself. "
    "POST /v1/vector-tables/{id}/backfill starts it, and so does a new configuration."
)

_is_held = VectorTable.held_config_version.is_not_distinct_from(VectorTable.config_version)
may_sync = or_(
    VectorTable.sync_status.in_([SyncStatus.SYNCED.value, SyncStatus.ERROR.value]),
    and_(VectorTable.sync_status == SyncStatus.PENDING_REBACKFILL.value, _is_held),
)
"""Nothing is to be built first, so what is live is kept true."""


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
        total_rows=0,
        synced_rows=0,
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
    want_build(row)
    return True


def want_build(row: VectorTable) -> None:
    """The vectors have to follow a new configuration."""
    release(row)
    row.config_version += 1
    status = SyncStatus(row.sync_status)
    if row.live_version is not None and status in {SyncStatus.SYNCED, SyncStatus.ERROR}:
        set_status(row, SyncStatus.PENDING_REBACKFILL)


def reschedule(row: VectorTable, schedule: str | None, interval_seconds: int | None) -> None:
    """Takes another schedule; the next sync is set anew by it. Does nothing where it is the same."""
    if (schedule, interval_seconds) != (row.sync_schedule, row.sync_interval_seconds):
        row.sync_schedule, row.sync_interval_seconds = schedule, interval_seconds
        row.next_sync_at = None
        row.updated_at = now()


def set_status(row: VectorTable, status: SyncStatus, error: str | None = None) -> None:
    """Moves to a state, or stays in it; an error is kept until the next good run.

    Raises EmbeddError for a move that is not allowed.
    """
    present = SyncStatus(row.sync_status)
    if status is not present and status not in SYNC_STATUS_MOVES[present]:
        raise EmbeddError(f"A vector table does not go from {present} to {status}.")
    row.sync_status = status.value
    if error is not None:
        row.last_error, row.last_error_at = error, now()
    elif status is SyncStatus.SYNCED:
        row.last_error = row.last_error_at = None
    row.updated_at = now()


def note_errors(session: Session, vector_table_ids: Collection[str], error: str) -> None:
    """Tells what is wrong with vector tables that go on as they are; the next good run clears it."""
    session.execute(
        update(VectorTable)
        .where(VectorTable.id.in_(vector_table_ids), VectorTable.last_error.is_distinct_from(error))
        .values(last_error=error, last_error_at=now())
    )


def refuse(session: Session, vector_table_id: str, error: str) -> None:
    """A vector table cannot be kept true until somebody acts; what is live stays live. Does nothing the second time."""
    row = find(session, vector_table_id, lock=True)
    if row is None or row.deleted_at is not None or row.last_error == error:
        return
    status = SyncStatus(row.sync_status)
    if status in {SyncStatus.SYNCED, SyncStatus.PENDING_REBACKFILL} and row.live_version is not None:
        set_status(row, SyncStatus.ERROR, error)
    else:
        row.last_error, row.last_error_at = error, now()


def note_counts(
    session: Session, vector_table_id: str, version: int, point_count: int, failed_count: int, truncated_count: int
) -> None:
    """Rows and points of the live set, as a follower finds them between two comparisons with the source."""
    row = find(session, vector_table_id, lock=True)
    if row is not None and row.live_version == version and SyncStatus(row.sync_status) is not SyncStatus.BACKFILLING:
        live = session.get_one(VectorSetRow, (vector_table_id, version))
        live.truncated_count = (live.truncated_count or 0) + truncated_count
        row.synced_rows = point_count
        row.total_rows = point_count + failed_count + (live.skipped_count or 0)


def resting_status(session: Session, row: VectorTable) -> SyncStatus:
    """The state of a vector table that nothing runs on and nothing failed on."""
    if row.paused:
        return SyncStatus.PAUSED
    if row.live_version is None:
        return SyncStatus.PENDING
    live = session.get_one(VectorSetRow, (row.id, row.live_version))
    return SyncStatus.PENDING_REBACKFILL if live.config_version < row.config_version else SyncStatus.SYNCED


def come_to_rest(session: Session, row: VectorTable) -> None:
    """Nothing runs on the vector table any more: what had failed is an error still, until a run goes well."""
    status = resting_status(session, row)
    if status is SyncStatus.PENDING_REBACKFILL:
        set_status(row, status, _HELD if row.is_held and row.last_error is None else None)
    elif status is not SyncStatus.PAUSED and row.last_error is not None:
        set_status(row, SyncStatus.ERROR)
    else:
        set_status(row, status)


def hold(session: Session, row: VectorTable, config_version: int) -> None:
    """Somebody cancelled the build of this configuration: where it is not live, nothing begins it by itself."""
    if row.live_version is None:
        return
    if session.get_one(VectorSetRow, (row.id, row.live_version)).config_version < config_version:
        row.held_config_version = config_version
        if row.is_held:
            row.last_error, row.last_error_at = _HELD, now()


def release(row: VectorTable) -> None:
    """What was held is asked for again, or not wanted any more. Does nothing where nothing was."""
    row.held_config_version = None
    if row.last_error == _HELD:
        row.last_error = row.last_error_at = None


def note_success(row: VectorTable) -> None:
    """A run went well: what had failed is over; what is held is so still."""
    if row.last_error != _HELD:
        row.last_error = row.last_error_at = None


def mark_deleted(row: VectorTable) -> None:
    """Gone for callers at once; the reconcile sensor tears the storage down."""
    row.deleted_at = now()
    set_status(row, SyncStatus.DELETING)


def pause(session: Session, row: VectorTable) -> None:
    """Nothing syncs or re-backfills by itself any more; queries go on. Raises Conflict `sync_already_paused`."""
    if row.paused:
        raise Conflict(
            f"Sync of {row.name!r} is already paused.", code="sync_already_paused", resolution="Nothing to do."
        )
    row.paused = True
    if SyncStatus(row.sync_status) is not SyncStatus.BACKFILLING:
        set_status(row, resting_status(session, row))


def resume(session: Session, row: VectorTable) -> None:
    """Ends a pause; what had failed before or during it is an error still. Raises Conflict `sync_not_paused`."""
    if not row.paused:
        raise Conflict(f"Sync of {row.name!r} is not paused.", code="sync_not_paused", resolution="Nothing to do.")
    row.paused = False
    if SyncStatus(row.sync_status) is not SyncStatus.BACKFILLING:
        come_to_rest(session, row)


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


def never_built(session: Session, vector_table_ids: Collection[str]) -> set[str]:
    """Those of these that have no live set: there is nothing to sync."""
    statement = select(VectorTable.id).where(VectorTable.id.in_(vector_table_ids), VectorTable.live_version.is_(None))
    return set(session.scalars(statement))


def awaiting_rebackfill(session: Session) -> list[VectorTable]:
    """Vector tables whose configuration is newer than what is live, and that are neither paused nor held."""
    wanted = SyncStatus.PENDING_REBACKFILL.value
    return list(session.scalars(select(VectorTable).where(VectorTable.sync_status == wanted, ~_is_held)))


def being_deleted(session: Session) -> list[VectorTable]:
    """Vector tables whose storage is still to be torn down."""
    return list(session.scalars(select(VectorTable).where(VectorTable.sync_status == SyncStatus.DELETING.value)))


def due_for_sync(session: Session, instant: datetime, limit: int = 1000) -> list[VectorTable]:
    """Tables whose next sync has come, the longest due first.

    Without paused ones, those never built, and those with a live task: they are due until that has ended.
    """
    statement = (
        select(VectorTable)
        .where(
            VectorTable.next_sync_at <= instant,
            may_sync,
            VectorTable.live_version.is_not(None),
            ~_has_live_task(),
        )
        .order_by(VectorTable.next_sync_at)
        .limit(limit)
    )
    return list(session.scalars(statement))


def _has_live_task() -> ColumnElement[bool]:
    live = [status.value for status in LIVE_TASK_STATUSES]
    return select(Task.id).where(Task.target_id == VectorTable.id, Task.status.in_(live)).exists()


def without_next_sync(session: Session, limit: int = 1000) -> list[VectorTable]:
    """Tables that are live and not yet on the schedule: newly built ones, and those whose schedule was changed."""
    statement = (
        select(VectorTable)
        .where(
            VectorTable.next_sync_at.is_(None),
            VectorTable.live_version.is_not(None),
            VectorTable.deleted_at.is_(None),
        )
        .limit(limit)
    )
    return list(session.scalars(statement))


def remove(session: Session, vector_table_id: str) -> None:
    """Removes the record of a vector table whose storage is torn down. Idempotent."""
    row: Any = session.get(VectorTable, vector_table_id)
    if row is not None:
        session.delete(row)
