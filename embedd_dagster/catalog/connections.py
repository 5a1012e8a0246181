"""Connections to source databases; their secrets are sealed on the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.conflicts import mendable, must_be_unused, name_must_be_free
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import CdcStreamRow, Connection, Environment, VectorTable
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.errors import Conflict, NotFound


class ConnectionStatus(StrEnum):
    """The outcome of a connection's last test."""

    PENDING = "pending"
    CONNECTED = "connected"
    FAILED = "failed"


def create(
    session: Session,
    box: SecretBox,
    environment: Environment,
    *,
    name: str,
    provider: str,
    mode: str,
    credentials: Mapping[str, Any],
) -> Connection:
    """A new, untested connection. Raises Conflict."""
    connection = Connection(
        id=new_id("conn"),
        org_id=environment.org_id,
        environment_id=environment.id,
        name=name,
        provider=provider,
        mode=mode,
        status=ConnectionStatus.PENDING.value,
        created_at=now(),
        updated_at=now(),
    )
    set_credentials(connection, box, credentials)
    try:
        with name_must_be_free(session, "connection", name):
            session.add(connection)
    except Conflict as conflict:
        raise mendable(session, conflict, Connection, environment.id, name) from None
    return connection


def set_credentials(connection: Connection, box: SecretBox, credentials: Mapping[str, Any]) -> None:
    """Replaces settings and secrets, which are the values of type SecretStr; the connection counts as untested."""
    if credentials and not any(isinstance(value, SecretStr) for value in credentials.values()):
        raise TypeError("Credentials come from their connector's model: without it, secrets would be stored in clear.")
    connection.settings = {name: value for name, value in credentials.items() if not isinstance(value, SecretStr)}
    secrets = {name: value.get_secret_value() for name, value in credentials.items() if isinstance(value, SecretStr)}
    connection.credentials = box.seal(secrets, row_id=connection.id)
    connection.status = ConnectionStatus.PENDING.value
    connection.updated_at = now()


def open_credentials(connection: Connection, box: SecretBox) -> dict[str, Any]:
    """Everything needed to connect, secrets included. Raises SecretUnreadable."""
    return {**connection.settings, **box.open(connection.credentials, row_id=connection.id)}


def record_test(connection: Connection, error: str | None) -> None:
    """Moves the status by the outcome of a test: `error` is None for a good one."""
    connection.status = (ConnectionStatus.CONNECTED if error is None else ConnectionStatus.FAILED).value
    connection.last_error = error
    connection.tested_at = now()


def rename(session: Session, connection: Connection, name: str) -> None:
    """Another name. Raises Conflict."""
    if name != connection.name:
        with name_must_be_free(session, "connection", name):
            connection.name = name
            connection.updated_at = now()


def get(session: Session, environment_id: str, connection_id: str, *, lock: bool = False) -> Connection:
    """The connection. Raises NotFound, also for one of another environment."""
    connection = session.get(Connection, connection_id, with_for_update=lock or None, populate_existing=lock)
    if connection is None or connection.environment_id != environment_id:
        raise NotFound("connection", connection_id)
    return connection


def find(session: Session, connection_id: str) -> Connection | None:
    """The connection of any environment, or None."""
    return session.get(Connection, connection_id, populate_existing=True)


def page(
    session: Session, environment_id: str, limit: int, after: Position | None, *, name: str | None = None
) -> Page[Connection]:
    """The environment's connections (of this name), newest first."""
    statement = select(Connection).where(Connection.environment_id == environment_id)
    return fetch_page(session, having(statement, {Connection.name: name}), Connection, limit, after)


def delete(
    session: Session,
    environment_id: str,
    connection_id: str,
    *,
    leftover_resolution: Callable[[str, str], str],
    force: bool = False,
) -> None:
    """Removes a connection that nothing uses. Raises NotFound, Conflict.

    What followed its changes is dropped from its database first, in the background: left behind, a slot fills the server's
    disk. So are the vectors of deleted vector tables. With `force`, nothing is waited for; that is for a database that does
    not come back.
    """
    connection = get(session, environment_id, connection_id)
    leaving = _leaving(session, connection)
    if force:
        for table in leaving:
            session.delete(table)
        session.flush()
    elif leaving:
        raise Conflict(
            f"The vectors of {leaving[0].name!r}, which was deleted, are still to be removed from its database.",
            code="connection_conflict",
            resolution="Try again in some seconds. Where the database does not come back, delete with ?force=true.",
        )
    must_be_unused(session, "connection", connection, VectorTable.connection_id)
    stream = session.get(CdcStreamRow, connection_id)
    if stream is not None and not force:
        trouble = f" {stream.last_error}" if stream.last_error else ""
        raise Conflict(
            f"What followed the changes of {connection.name!r} is still to be removed from its database.{trouble}",
            code="connection_conflict",
            resolution="Try again in some seconds. If the database does not come back, delete with ?force=true. "
            + leftover_resolution(connection.provider, stream.name),
        )
    session.delete(connection)


def _leaving(session: Session, connection: Connection) -> list[VectorTable]:
    """Vector tables that were deleted, and whose vectors are in the connection's own database until that has answered."""
    statement = select(VectorTable).where(
        VectorTable.connection_id == connection.id,
        VectorTable.deleted_at.is_not(None),
        VectorTable.mode == Mode.PLATFORM.value,
    )
    return list(session.scalars(statement))
