"""Whether a connection has its own server session, which CDC needs."""

from __future__ import annotations

from typing import Final

from embedd_dagster.connectors.postgresql.errors import translated
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection
from embedd_dagster.connectors.postgresql.source_connections import SourceConnections
from embedd_dagster.deadlines import Deadline
from embedd_dagster.errors import SourceRejected, SourceUnavailable

_ROUNDS: Final = 3
_WAIT_SECONDS: Final = 5.0


def require_own_session(connections: SourceConnections) -> None:
    """Returns when each connection has a server session of its own.

    Raises SourceRejected behind a pooler in transaction mode, with the port of the server itself.
    """
    server = connections.server
    with translated(server):
        first = connections.open()
        try:
            if first.is_direct or not _shares_sessions(first, connections):
                return
            row = first.execute("SELECT pg_catalog.current_setting('port')").fetchone()
        finally:
            first.close()
    raise SourceRejected(
        f"Changes of database {server.database!r} cannot be followed through {server}: that is a connection pooler in"
        " transaction mode (such as PgBouncer), and following needs a session of its own.",
        resolution=f"Let the connection lead to PostgreSQL itself, which listens on port {row[0] if row else 5432} of the"
        " database server, or to a pooler in session mode. Or use sync_mode batch, which works through this pooler.",
    )


def _shares_sessions(first: ScopedConnection, connections: SourceConnections) -> bool:
    """Whether two connections are given the same server process, or one of them is given several."""
    first_pid = first.server_pid
    try:
        second = connections.open(Deadline(_WAIT_SECONDS))
    except SourceUnavailable:
        return False  # a pooler in session mode whose only session is kept for the first connection
    try:
        second_pid = second.server_pid
        for _ in range(_ROUNDS):
            if first_pid == second_pid:
                return True
            for connection in (first, second):
                connection.execute("SELECT 1")
            if (first.server_pid, second.server_pid) != (first_pid, second_pid):
                return True
        return False
    finally:
        second.close()
