"""psycopg's errors → ours. Nothing of a row gets into a message: a server's text may quote values, so it is not used.

Only what libpq says while a connection is being made is passed on: no row has been read by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.identifiers import quoted
from embedd_dagster.connectors.postgresql.login import method_fault
from embedd_dagster.errors import (
    EmbeddError,
    SourceAccessDenied,
    SourceRejected,
    SourceTableNotFound,
    SourceUnavailable,
)

# By SQLSTATE, or by its class (the first two characters): what is wrong, and whether it passes by itself.
_STATES: Final[dict[str, tuple[type[SourceUnavailable | SourceRejected], str]]] = {
    "08": (SourceUnavailable, "the connection was lost"),
    "0A": (SourceRejected, "it does not support this kind of reading"),
    "22": (SourceRejected, "it holds, or a view's expression makes, a value that PostgreSQL itself cannot process"),
    "25006": (SourceRejected, "reading it wants to write, which a source never does"),
    "25P03": (SourceUnavailable, "the connection was idle for longer than the server allows"),
    "25P04": (SourceUnavailable, "the statement ran for longer than the server allows"),
    "40": (SourceUnavailable, "the statement was in conflict with others, or with the recovery of a replica"),
    "42883": (SourceRejected, "a function is missing that PostgreSQL has from version 14 on, or that a view uses"),
    "53": (SourceUnavailable, "the server is short of resources"),
    "53300": (SourceUnavailable, "the server has no connection left for us"),
    "54": (SourceRejected, "a row, or the statement over its columns, is larger than PostgreSQL allows"),
    "55P03": (SourceUnavailable, "it is locked by another session"),
    "57": (SourceUnavailable, "the server interrupted the statement"),
    "57014": (SourceUnavailable, "it took longer than the statement timeout, or somebody cancelled it"),
    "57P01": (SourceUnavailable, "the server is being shut down"),
    "57P02": (SourceUnavailable, "the server crashed and restarts"),
    "57P03": (SourceUnavailable, "the server is starting up or shutting down"),
    "57P04": (SourceRejected, "the database was dropped"),
    "58": (SourceUnavailable, "the server has trouble with its own machine"),
    "XX": (SourceRejected, "the server reports an internal error or damaged data"),
}
_PATH_ADVICE: Final = (
    "If it is a view whose function names tables or functions without their schema: embedd reads with the search path"
    " pg_catalog. Give that function its own: ALTER FUNCTION <name> SET search_path = <schemas>;"
)
_RESOLUTIONS: Final = {
    "42883": _PATH_ADVICE,
    "53300": "Raise the server's max_connections, or end sessions that are not needed.",
    "57014": "Raise the statement timeout of sources, or give the primary key column an index.",
}
_MISSING: Final = frozenset({"42P01", "42703", "3F000", "42704"})
_LOOK: Final = "Run a SELECT on it as the connection's user to see the server's own message, and correct the cause."

# libpq gives no SQLSTATE when a connection cannot be made, only English text.
_DENIED_TEXTS: Final = (
    "authentication failed", "no password supplied", "role \"", "pg_hba.conf", "not permitted to log in",
    "permission denied for database",
)  # fmt: skip
_REJECTED_TEXTS: Final = ("does not support SSL", "certificate", "SSL required", "is not currently accepting")


@contextmanager
def translated(server: Server, *, relation: str | None = None) -> Iterator[None]:
    """Raises ours for every error of psycopg that leaves the block; `relation` is the SQL name of the table at hand."""
    try:
        yield
    except (psycopg.Error, psycopg.Warning, UnicodeError) as error:
        raise translate(error, server, relation=relation) from None


def translate(error: Exception, server: Server, *, relation: str | None = None) -> EmbeddError:
    """Our error for one that psycopg raised on an open connection."""
    state = getattr(error, "sqlstate", None)
    if not state:
        return _without_state(error, server)
    if state == "42501":
        return access_denied(server, relation)
    if state.startswith("28"):
        return login_denied(server)
    if state == "3D000":
        return no_database(server)
    what = f"table {relation}" if relation else f"database {server.database!r}"
    if state in _MISSING:
        return SourceTableNotFound(
            f"The {what}, or a column that is read of it, is not there any more.",
            resolution=f"{SourceTableNotFound.default_resolution} {_PATH_ADVICE}",
        )
    kind, reason = _STATES.get(state) or _STATES.get(state[:2]) or (SourceRejected, "the server refuses the statement")
    resolution = _RESOLUTIONS.get(state) or (_LOOK if kind is SourceRejected else None)
    message = f"Reading {what} at {server} failed: {reason} ({type(error).__name__}, SQLSTATE {state})."
    return kind(message, resolution=resolution)


def _without_state(error: Exception, server: Server) -> EmbeddError:
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return SourceUnavailable(f"The connection to PostgreSQL at {server} was lost.")
    # What a driver says of a value it cannot read quotes the value.
    return SourceRejected(f"A value of database {server.database!r} cannot be read ({type(error).__name__}).")


def access_denied(server: Server, relation: str | None, *, grant: str | None = None) -> SourceAccessDenied:
    """No right to read; the resolution is the statement that gives it."""
    grant = grant or f"GRANT SELECT ON {relation or '<table>'} TO {quoted(server.grantee)};"
    return SourceAccessDenied(
        f"The user {server.grantee!r} may not read {relation or 'a table'} in database {server.database!r}.",
        resolution=f"Run as the table's owner: {grant}",
    )


def login_denied(server: Server) -> SourceAccessDenied:
    """The server does not let this user in."""
    return SourceAccessDenied(
        f"PostgreSQL at {server} does not let user {server.user!r} into database {server.database!r}.",
        resolution="Check the connection's user and password, and that pg_hba.conf and the role's LOGIN right allow it.",
    )


def no_database(server: Server) -> SourceRejected:
    """The server answers, the database is not there."""
    return SourceRejected(
        f"There is no database {server.database!r} on PostgreSQL at {server}.",
        resolution="Correct the connection's `database`.",
    )


def connect_error(error: Exception, server: Server, password: str) -> EmbeddError:
    """Our error for a connection that could not be made."""
    if getattr(error, "sqlstate", None):
        return translate(error, server)
    text = str(error)
    if fault := method_fault(text, server.user):
        return SourceAccessDenied(f"No connection to PostgreSQL at {server}: {fault[0]}.", resolution=fault[1])
    if any(part in text for part in _DENIED_TEXTS):
        return login_denied(server)
    if f'database "{server.database}" does not exist' in text:
        return no_database(server)
    reason = (text.strip().splitlines() or ["it does not answer"])[0].removeprefix("connection failed: ").rstrip(".")
    if password and password in reason:
        reason = "it does not answer"
    if any(part in text for part in _REJECTED_TEXTS):
        return SourceRejected(
            f"No connection to PostgreSQL at {server}: {reason}.",
            resolution="Correct the connection's `ssl_mode`, or the server's certificate.",
        )
    return SourceUnavailable(f"No connection to PostgreSQL at {server}: {reason}.")
