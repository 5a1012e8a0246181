"""Connections to source databases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from embedd_dagster.catalog import connections
from embedd_dagster.catalog.pages import Page
from embedd_dagster.catalog.tables import Connection
from embedd_dagster.connectors import registry
from embedd_dagster.engine import validation
from embedd_dagster.errors import (
    EmbeddError,
    NotReady,
    SecretUnreadable,
    SourceAccessDenied,
    SourceTableNotFound,
    ValidationFailed,
)
from embedd_dagster.protocols.source import Source, SourceColumn, SourceTable

from ..auth import Caller, Reader, Writer
from ..error_codes import error_responses
from ..idempotency import Idempotent, IdempotentRequest, idempotent_responses
from ..limits import EXTERNAL_CALLS
from ..pagination import (
    DEFAULT_LIMIT,
    Cursor,
    Limit,
    NameFilter,
    PageRequest,
    index_of,
    list_answer,
    position_at,
    text_filter,
)
from ..schemas.base import ConnectionId
from ..schemas.connections import (
    ConnectionAnswer,
    ConnectionList,
    ConnectionUpdate,
    SourceTableAnswer,
    SourceTableColumnAnswer,
    SourceTableColumnList,
    SourceTableList,
    TestAnswer,
    connection_create_model,
    connection_update_model,
    read_new_credentials,
)
from ..strict_json import StrictRoute

router = APIRouter(route_class=StrictRoute)


def build_router() -> APIRouter:
    """The routes of connections. What a user sends of credentials goes by the connectors that are registered now."""
    routes = APIRouter(tags=["Connections"], route_class=StrictRoute)
    for provider in registry.sources():
        routes.add_api_route(
            f"/providers/{provider}/connections",
            _create_endpoint(provider),
            methods=["POST"],
            name=f"create_{provider}_connection",
            description=f"Create a connection to a {registry.connector(provider).title} database. "
            "It is tested at once: see `status` and `last_error`.",
            status_code=201,
            dependencies=EXTERNAL_CALLS,
            responses=idempotent_responses(201, "permission_denied", "name_conflict", "server_busy"),
        )
    routes.include_router(router)
    routes.add_api_route(
        "/connections/{connection_id}",
        _update_endpoint(),
        methods=["PUT"],
        name="update_connection",
        description="Rename a connection, or give it other credentials, which are tested at once.",
        dependencies=EXTERNAL_CALLS,
        responses=error_responses("permission_denied", "connection_not_found", "name_conflict", "server_busy"),
    )
    return routes


def _create_endpoint(provider: str) -> Callable[..., ConnectionAnswer]:
    def create(body: Any, caller: Writer, idempotent: Idempotent) -> ConnectionAnswer:
        with idempotent:
            return _create(caller, idempotent, provider, body.name, body.mode, body.credentials.model_dump())

    create.__annotations__["body"] = connection_create_model(provider)  # FastAPI reads the body's model from here
    return create


def _create(
    caller: Caller, idempotent: IdempotentRequest, provider: str, name: str, mode: str, credentials: dict[str, Any]
) -> ConnectionAnswer:
    runtime = caller.state.runtime
    with runtime.catalog.transaction() as session:
        row = connections.create(
            session, runtime.box, caller.environment, name=name, provider=provider, mode=mode, credentials=credentials
        )
        idempotent.remember(session, ConnectionAnswer.model_validate(row), more_follows=True)
    return _test(caller, row, idempotent)[1]


@router.post("/providers/{provider}/connections", include_in_schema=False)
def create_unsupported_connection(
    provider: Annotated[str, Path(max_length=100)],
    caller: Writer,  # noqa: ARG001 - a key is needed all the same
) -> None:
    """What is answered for every provider that has no endpoint of its own."""
    raise ValidationFailed(
        f"provider: {provider!r} is not supported in this installation; supported: {', '.join(registry.sources())}.",
        resolution="Use a supported provider, or a version of embedd that has this one.",
    )


@router.get("/connections", responses=error_responses())
def list_connections(
    caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, name: NameFilter = None
) -> ConnectionList:
    """List connections."""
    asked = PageRequest.read(limit, cursor, name=name)
    with caller.state.runtime.catalog.transaction() as session:
        page = connections.page(session, caller.environment.id, limit, asked.after, name=name)
    return list_answer(ConnectionList, page, asked, ConnectionAnswer.model_validate)


@router.get("/connections/{connection_id}", responses=error_responses("connection_not_found"))
def get_connection(connection_id: ConnectionId, caller: Reader) -> ConnectionAnswer:
    """Get a connection."""
    return ConnectionAnswer.model_validate(_get(caller, connection_id))


def _get(caller: Caller, connection_id: str) -> Connection:
    with caller.state.runtime.catalog.transaction() as session:
        return connections.get(session, caller.environment.id, connection_id)


def _update_endpoint() -> Callable[..., ConnectionAnswer]:
    def update(connection_id: ConnectionId, body: ConnectionUpdate, caller: Writer) -> ConnectionAnswer:
        given = body.model_fields_set
        with caller.state.runtime.catalog.transaction() as session:
            row = connections.get(session, caller.environment.id, connection_id, lock=True)
            if "name" in given:
                connections.rename(session, row, body.name)
            if "credentials" in given:
                credentials = read_new_credentials(row.provider, row.settings, body.credentials)
                connections.set_credentials(row, caller.state.runtime.box, credentials)
        return _test(caller, row)[1] if "credentials" in given else ConnectionAnswer.model_validate(row)

    update.__annotations__["body"] = connection_update_model()
    return update


@router.delete(
    "/connections/{connection_id}",
    status_code=204,
    responses=error_responses("permission_denied", "connection_not_found", "connection_conflict"),
)
def delete_connection(
    connection_id: ConnectionId,
    caller: Writer,
    force: Annotated[
        bool, Query(description="Also where what followed its changes is still in its database, and cannot be removed")
    ] = False,
) -> None:
    """Delete a connection that no vector table uses."""
    with caller.state.runtime.catalog.transaction() as session:
        connections.delete(
            session,
            caller.environment.id,
            connection_id,
            leftover_resolution=registry.leftover_resolution,
            force=force,
        )


@router.post(
    "/connections/{connection_id}/test",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses("permission_denied", "connection_not_found", "server_busy"),
)
def check_connection(connection_id: ConnectionId, caller: Writer) -> TestAnswer:
    """Test a connection, and keep the outcome as its `status`. A failed test is a 200 with `status: failed`."""
    return _test(caller, _get(caller, connection_id))[0]


def _test(
    caller: Caller, connection: Connection, idempotent: IdempotentRequest | None = None
) -> tuple[TestAnswer, ConnectionAnswer]:
    """The outcome, and the connection with it recorded; outside of any transaction, as a source may be slow."""
    begun = time.perf_counter()
    fault: str | None = None
    try:
        validation.check_connection(caller.state.runtime, connection)
    except EmbeddError as error:
        fault = f"{error.message} {error.resolution}"
    latency_ms = round((time.perf_counter() - begun) * 1000, 1)
    with caller.state.runtime.catalog.transaction() as session:
        row = connections.get(session, caller.environment.id, connection.id, lock=True)
        if row.updated_at == connection.updated_at:  # else other credentials came meanwhile, with a test of their own
            connections.record_test(row, fault)
        shown = ConnectionAnswer.model_validate(row)
        if idempotent is not None:
            idempotent.remember(session, shown)
    return TestAnswer(status="failed" if fault else "ok", latency_ms=latency_ms, error=fault), shown


@router.get(
    "/connections/{connection_id}/tables",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses(
        "connection_not_found",
        "connection_not_ready",
        "source_table_access_denied",
        "source_unavailable",
        "server_busy",
    ),
)
def list_source_tables(
    connection_id: ConnectionId,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=10_000, description="How many at the most")] = 1000,
    name: Annotated[str | None, text_filter("Only the table that `source_table` may name so", max_length=255)] = None,
) -> SourceTableList:
    """List the tables and views that the connection may read, by name."""
    with _open_source(caller, connection_id) as source:
        found = source.tables(limit + 1) if name is None else _named(source, name)
    return SourceTableList(
        tables=[
            SourceTableAnswer(name=t.name, type="view" if t.is_view else "table", row_estimate=t.row_estimate)
            for t in found[:limit]
        ],
        truncated=len(found) > limit,
    )


@contextmanager
def _open_source(caller: Caller, connection_id: str) -> Iterator[Source]:
    connection = _get(caller, connection_id)
    try:
        opened = validation.open_source_briefly(caller.state.runtime, connection)
    except SecretUnreadable as error:
        raise NotReady(error.message, code="connection_not_ready", resolution=error.resolution) from None
    with opened as source:
        yield source


def _named(source: Source, name: str) -> list[SourceTable]:
    try:
        return [source.describe(name)]
    except (SourceTableNotFound, SourceAccessDenied):
        return []


@router.get(
    "/connections/{connection_id}/tables/{table:path}/columns",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses(
        "connection_not_found",
        "connection_not_ready",
        "source_table_not_found",
        "source_table_access_denied",
        "source_unavailable",
        "server_busy",
    ),
)
def list_source_columns(
    connection_id: ConnectionId,
    table: Annotated[
        str, Path(max_length=255, pattern=r"^[^\x00]+$", description="As `source_table`", examples=["public.products"])
    ],
    caller: Reader,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
    name: Annotated[str | None, text_filter("Only the column of exactly this name", max_length=255)] = None,
) -> SourceTableColumnList:
    """List the columns of a table or view, before there is a vector table of it, in the table's own order."""
    asked = PageRequest.read(limit, cursor, table=table, name=name)
    with _open_source(caller, connection_id) as source:
        columns = [column for column in source.describe(table).columns if name in (None, column.name)]
    begin = index_of(asked.after)
    shown = columns[begin : begin + limit]
    following = position_at(begin + limit) if begin + limit < len(columns) else None
    return list_answer(SourceTableColumnList, Page(shown, following), asked, _shown_column)


def _shown_column(column: SourceColumn) -> SourceTableColumnAnswer:
    return SourceTableColumnAnswer(
        name=column.name,
        type=column.type,
        nullable=column.nullable,
        filter_types=sorted(column.filter_types),
        can_be_key=column.is_key_type,
    )
