"""Vector tables."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from embedd_dagster.catalog import connections, moved_tables, table_details, tasks, vector_tables
from embedd_dagster.catalog.partitions import RunLabel
from embedd_dagster.catalog.table_details import TableDetails
from embedd_dagster.catalog.tables import Connection, VectorTable
from embedd_dagster.catalog.vector_tables import Endpoints, NewVectorTable
from embedd_dagster.core.status import TaskType
from embedd_dagster.core.vector_table import Mode, SyncMode, VectorConfiguration
from embedd_dagster.engine import validation
from embedd_dagster.engine.estimate import estimate
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import NotFound, ValidationFailed

from ..auth import Caller, Reader, Writer
from ..error_codes import error_responses
from ..idempotency import Idempotent, idempotent_responses
from ..limits import EXTERNAL_CALLS
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, NameFilter, PageRequest, list_answer, text_filter
from ..schemas.base import VectorTableId
from ..schemas.vector_tables import (
    BackfillAnswer,
    EstimateAnswer,
    SourceColumnAnswer,
    SourceSchemaAnswer,
    SyncStatusName,
    VectorTableAnswer,
    VectorTableCreate,
    VectorTableList,
    VectorTableUpdate,
)
from ..strict_json import StrictRoute

router = APIRouter(prefix="/vector-tables", tags=["Vector tables"], route_class=StrictRoute)

_VALIDATION = (
    "permission_denied", "source_table_access_denied", "source_table_not_found", "name_conflict",
    "connection_not_ready", "source_unavailable", "vector_store_unavailable", "server_busy",
)  # fmt: skip


@router.post(
    "",
    status_code=201,
    response_model_exclude_unset=True,
    dependencies=EXTERNAL_CALLS,
    responses=idempotent_responses(201, *_VALIDATION, "connection_not_found", "embedding_provider_not_found"),
)
def create_vector_table(body: VectorTableCreate, caller: Writer, idempotent: Idempotent) -> VectorTableAnswer:
    """Create a vector table: link a source table to its vector representation.

    The configuration is checked first, also against the source. Nothing is embedded before the first backfill.
    """
    wanted = NewVectorTable(
        name=body.name,
        connection_id=body.connection_id,
        configuration=VectorConfiguration(
            source_table=body.source_table,
            primary_key_column=body.primary_key_column,
            columns=tuple(column.to_column() for column in body.columns),
            embedding_model=body.embedding_model,
            embedding_dimensions=body.embedding_dimensions,
            embedding_provider_id=body.embedding_provider_id,
        ),
        mode=Mode(body.mode),
        sync_mode=SyncMode(body.sync_mode),
        sync_schedule=body.sync_schedule,
        sync_interval_seconds=body.sync_interval_seconds,
    )
    with idempotent:
        validated = validation.validate_vector_table(caller.state.runtime, caller.environment.id, wanted)
        with caller.state.runtime.catalog.transaction() as session:
            row = vector_tables.create(session, caller.environment, validated)
            return idempotent.remember(session, VectorTableAnswer.of(row, TableDetails()))


@router.get("", response_model_exclude_unset=True, responses=error_responses())
def list_vector_tables(
    caller: Reader,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
    name: NameFilter = None,
    sync_status: Annotated[
        SyncStatusName | None, Query(description="Only the vector tables with this sync_status")
    ] = None,
    connection_id: Annotated[str | None, text_filter("Only the vector tables of this connection")] = None,
    source_table: Annotated[
        str | None, text_filter("Only the vector tables with exactly this `source_table`", max_length=255)
    ] = None,
) -> VectorTableList:
    """List the vector tables that match all given filters."""
    wanted = {
        "name": name,
        "sync_status": sync_status,
        "connection_id": connection_id,
        "source_table": source_table,
    }
    asked = PageRequest.read(limit, cursor, **wanted)
    with caller.state.runtime.catalog.transaction() as session:
        page = vector_tables.page(session, caller.environment.id, limit, asked.after, **wanted)
        details = table_details.read(session, [row.id for row in page.items])
    return list_answer(VectorTableList, page, asked, lambda row: VectorTableAnswer.of(row, details[row.id]))


@router.get(
    "/{vector_table_id}", response_model_exclude_unset=True, responses=error_responses("vector_table_not_found")
)
def get_vector_table(vector_table_id: VectorTableId, caller: Reader) -> VectorTableAnswer:
    """Get a vector table."""
    with caller.state.runtime.catalog.transaction() as session:
        return _answer(session, vector_tables.get(session, caller.environment.id, vector_table_id))


def _answer(session: Session, row: VectorTable) -> VectorTableAnswer:
    session.flush()
    return VectorTableAnswer.of(row, table_details.read(session, [row.id])[row.id])


@router.put(
    "/{vector_table_id}",
    response_model_exclude_unset=True,
    dependencies=EXTERNAL_CALLS,
    responses=error_responses(*_VALIDATION, "vector_table_not_found", "backfill_in_progress"),
)
def update_vector_table(vector_table_id: VectorTableId, body: VectorTableUpdate, caller: Writer) -> VectorTableAnswer:
    """Update a vector table.

    Changing `columns`, `embedding_model` or `embedding_dimensions` sets `sync_status` to `pending_rebackfill`; the
    re-backfill builds new vectors next to the live ones and replaces those atomically. The same values again have no effect.
    Changing `source_table`, for example after a rename, starts a sync that embeds only what differs.
    """
    runtime = caller.state.runtime
    with runtime.catalog.transaction() as session:
        seen = _endpoints(session, caller, vector_table_id)
    old = seen.vector_table.configuration
    is_moved = "source_table" in body.model_fields_set and body.source_table != old.source_table
    if is_moved and seen.vector_table.sync_mode == SyncMode.CDC:
        raise ValidationFailed(
            "source_table: only batch tables can change it.",
            resolution="Rename the table back, or create a new vector table.",
        )
    checked = validation.admit_change(runtime, seen.connection, seen.embedding_provider, old, _merged(old, body))
    key_type = validation.source_key_type(runtime, seen.connection, checked) if is_moved else None
    with runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
        if key_type is not None:
            moved_tables.move(session, row, checked.source_table, key_type)
        _change(caller.state.runtime, session, row, body, seen, checked)
        return _answer(session, row)


def _endpoints(session: Session, caller: Caller, vector_table_id: str) -> Endpoints:
    vector_tables.get(session, caller.environment.id, vector_table_id)
    found = vector_tables.load_endpoints(session, vector_table_id)
    if found is None:
        raise NotFound("vector_table", vector_table_id)
    return found


def _merged(old: VectorConfiguration, body: VectorTableUpdate) -> VectorConfiguration:
    """The configuration with the values of the body."""
    given = body.model_fields_set
    new = old
    if "source_table" in given:
        new = replace(new, source_table=body.source_table)
    if "columns" in given:
        new = replace(new, columns=tuple(column.to_column() for column in body.columns))
    if "embedding_model" in given:
        new = replace(new, embedding_model=body.embedding_model)
    if "embedding_dimensions" in given:
        new = replace(new, embedding_dimensions=body.embedding_dimensions)
    return new


def _change(
    runtime: Runtime,
    session: Session,
    row: VectorTable,
    body: VectorTableUpdate,
    seen: Endpoints,
    checked: VectorConfiguration,
) -> None:
    """Writes the change to the locked row, which another request may have changed since `seen` was read."""
    given = body.model_fields_set
    schedule = body.sync_schedule if "sync_schedule" in given else row.sync_schedule
    interval = body.sync_interval_seconds if "sync_interval_seconds" in given else row.sync_interval_seconds
    validation.check_schedule(SyncMode(row.sync_mode), schedule, interval)
    current = row.configuration
    columns = checked.columns if "columns" in given else current.columns
    model = body.embedding_model if "embedding_model" in given else current.embedding_model
    dimensions = body.embedding_dimensions if "embedding_dimensions" in given else current.embedding_dimensions
    if (model, dimensions) != (current.embedding_model, current.embedding_dimensions):
        wanted = replace(current, embedding_model=model, embedding_dimensions=dimensions)
        validation.check_embedding(runtime, seen.connection, seen.embedding_provider, wanted)
    if "name" in given:
        vector_tables.rename(session, row, body.name)
    vector_tables.reconfigure(row, columns=columns, embedding_model=model, embedding_dimensions=dimensions)
    vector_tables.reschedule(row, schedule, interval)


@router.delete(
    "/{vector_table_id}", status_code=204, responses=error_responses("permission_denied", "vector_table_not_found")
)
def delete_vector_table(vector_table_id: VectorTableId, caller: Writer) -> None:
    """Delete a vector table. It disappears at once; its vectors are deleted in the background."""
    with caller.state.runtime.catalog.transaction() as session:
        vector_tables.get(session, caller.environment.id, vector_table_id)
        # lock the task before the vector table, as its run does. The reconcile sensor ends a task that starts in between
        live = tasks.find_live(session, vector_table_id, lock=True)
        vector_tables.mark_deleted(vector_tables.get(session, caller.environment.id, vector_table_id, lock=True))
        run_id = live.dagster_run_id if live is not None else None
        if live is not None:
            tasks.request_cancel(session, live)
    if run_id is not None:
        caller.state.launcher.terminate(run_id)


@router.post(
    "/{vector_table_id}/backfill",
    responses=idempotent_responses(200, "permission_denied", "vector_table_not_found", "backfill_in_progress"),
)
def start_backfill(vector_table_id: VectorTableId, caller: Writer, idempotent: Idempotent) -> BackfillAnswer:
    """Start an asynchronous backfill: read all rows, embed them, store the vectors, then make them live.

    Answers at once; `GET /v1/tasks/{task_id}` shows the progress.
    """
    state = caller.state
    with idempotent:
        with state.runtime.catalog.transaction() as session:
            row = vector_tables.get(session, caller.environment.id, vector_table_id)
            connection = connections.get(session, caller.environment.id, row.connection_id)
        total_rows = row.total_rows or state.estimate_rows(connection, row.source_table)
        with state.runtime.catalog.transaction() as session:
            row = vector_tables.get(session, caller.environment.id, vector_table_id, lock=True)
            label = RunLabel.of(row)
            task = tasks.create(
                session,
                row,
                TaskType.BACKFILL,
                max_attempts=state.settings.max_task_attempts,
                total_rows=total_rows,
            )
            started = BackfillAnswer(
                vector_table_id=vector_table_id,
                status="backfilling",
                total_rows=total_rows,
                synced_rows=0,
                task_id=task.id,
            )
            idempotent.remember(session, started)
    state.launcher.launch(task.id, vector_table_id, label, TaskType.BACKFILL)
    return started


@router.get(
    "/{vector_table_id}/schema",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses(
        "vector_table_not_found",
        "source_table_not_found",
        "source_table_access_denied",
        "source_unavailable",
        "server_busy",
    ),
)
def get_source_schema(vector_table_id: VectorTableId, caller: Reader) -> SourceSchemaAnswer:
    """Get the columns of the source table, with the type names of the source."""
    with caller.state.runtime.catalog.transaction() as session:
        row = vector_tables.get(session, caller.environment.id, vector_table_id)
        connection: Connection = connections.get(session, caller.environment.id, row.connection_id)
    with validation.open_source_briefly(caller.state.runtime, connection) as source:
        table = source.describe(row.source_table)
    return SourceSchemaAnswer(
        columns=[SourceColumnAnswer(name=c.name, type=c.type, nullable=c.nullable) for c in table.columns]
    )


@router.post(
    "/{vector_table_id}/estimate",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses(
        "permission_denied",
        "vector_table_not_found",
        "source_table_not_found",
        "source_table_access_denied",
        "source_unavailable",
        "vector_store_unavailable",
        "server_busy",
    ),
)
def estimate_backfill(vector_table_id: VectorTableId, caller: Writer) -> EstimateAnswer:
    """Estimate a backfill: rows, tokens, cost, time, and the vectors it would reuse. Embeds nothing."""
    found = estimate(caller.state.runtime, caller.environment.id, vector_table_id)
    return EstimateAnswer(**asdict(found))
