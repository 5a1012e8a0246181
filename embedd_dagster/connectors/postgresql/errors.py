"""Translates psycopg's errors to ours, as a source or as a vector store raises them.

No value of a row gets into a message: a server's text may quote values, so it is not used. Only what libpq says while a
connection is being made is passed on, as no row has been read by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    VectorStoreRejected,
    VectorStoreUnavailable,
)


@dataclass(frozen=True, slots=True)
class ErrorFamily:
    """The errors of a source, or those of a vector store."""

    unavailable: type[SourceUnavailable | VectorStoreUnavailable]
    rejected: type[SourceRejected | VectorStoreRejected]
    action: str
    """What failed, in a message: `Reading` in `Reading table t at h:5432 failed`."""
    advice: str
    """What to do about a statement that the server rejects."""
    permanent: frozenset[str]
    """SQLSTATEs that do not pass by themselves although their class does."""


SOURCE: Final = ErrorFamily(
    SourceUnavailable,
    SourceRejected,
    "Reading",
    "Run a SELECT on it as the connection's user to see the server's own message, and correct the cause.",
    frozenset({"57P04"}),
)
# A full disk or a limit of the configuration: somebody has to act before vectors can be written again.
STORE: Final = ErrorFamily(
    VectorStoreUnavailable,
    VectorStoreRejected,
    "Using the vectors in",
    "Look at the database server's log for its own message, and correct the cause.",
    frozenset({"57P04", "53100", "53400"}),
)

# By SQLSTATE, or by its class (the first two characters).
_TRANSIENT: Final = {
    "08": "the connection was lost",
    "23505": "another session has written the same key",
    "25P03": "the connection was idle for longer than the server allows",
    "25P04": "the statement ran for longer than the server allows",
    "40": "the statement was in conflict with others, or with the recovery of a replica",
    "53": "the server is short of resources",
    "53300": "the server has no connection left for us",
    "55P03": "it is locked by another session",
    "57": "the server interrupted the statement",
    "57014": "it took longer than the statement timeout, or somebody cancelled it",
    "57P01": "the server is being shut down",
    "57P02": "the server crashed and restarts",
    "57P03": "the server is starting up or shutting down",
    "58": "the server has trouble with its own machine",
}
_PERMANENT: Final = {
    "0A": "PostgreSQL does not support such a statement for it",
    "22": "PostgreSQL cannot process a value that it holds, or that a view's expression makes",
    "25006": "the transaction is read-only, and the statement writes",
    "42883": "a function is missing that PostgreSQL has from version 14 on, or that a view uses",
    "53100": "the server's disk is full",
    "53400": "a limit of the server's configuration is reached",
    "54": "a row, or the statement over its columns, is larger than PostgreSQL allows",
    "57P04": "the database was dropped",
    "XX": "the server reports an internal error or damaged data",
}
_PATH_ADVICE: Final = (
    "If it is a view whose function names tables or functions without their schema: embedd reads with the search path"
    " pg_catalog. Set the function's own search path: ALTER FUNCTION <name> SET search_path = <schemas>;"
)
_RESOLUTIONS: Final = {
    "42883": _PATH_ADVICE,
    "53300": "Raise the server's max_connections, or end sessions that are not needed.",
    "57014": "Raise the statement timeout of sources, or give the primary key column an index.",
}
_MISSING: Final = frozenset({"42P01", "42703", "3F000", "42704"})

# libpq gives no SQLSTATE when a connection cannot be made, only English text.
_DENIED_TEXTS: Final = (
    "authentication failed", "no password supplied", "role \"", "pg_hba.conf", "not permitted to log in",
    "permission denied for database",
)  # fmt: skip
_REJECTED_TEXTS: Final = ("does not support SSL", "certificate", "SSL required", "is not currently accepting")


@contextmanager
def translated(server: Server, *, relation: str | None = None) -> Iterator[None]:
    """Raises a source's error for every error of psycopg that leaves the block. `relation` is the table's SQL name."""
    try:
        yield
    except (psycopg.Error, psycopg.Warning, UnicodeError) as error:
        raise translate(error, server, relation=relation) from None


def translate(
    error: Exception, server: Server, *, relation: str | None = None, family: ErrorFamily = SOURCE
) -> EmbeddError:
    """Our error for one that psycopg raised on an open connection."""
    state = getattr(error, "sqlstate", None)
    what = f"table {relation}" if relation else f"database {server.database!r}"
    if not state:
        return _without_state(error, server, family)
    if state == "42501":
        return access_denied(server, relation)
    if state.startswith("28"):
        return login_denied(server)
    if state == "3D000":
        return no_database(server, family)
    if state in _MISSING and family is SOURCE:
        return SourceTableNotFound(
            f"The {what}, or a column that is read of it, is not there any more.",
            resolution=f"{SourceTableNotFound.default_resolution} {_PATH_ADVICE}",
        )
    failure = f"{family.action} {what} at {server} failed", f"({type(error).__name__}, SQLSTATE {state})"
    return _by_state(state, failure, family)


def _without_state(error: Exception, server: Server, family: ErrorFamily) -> EmbeddError:
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return family.unavailable(f"The connection to PostgreSQL at {server} was lost.")
    # What a driver says of a value it cannot read quotes the value.
    return family.rejected(f"A value of database {server.database!r} cannot be read ({type(error).__name__}).")


def _by_state(state: str, failure: tuple[str, str], family: ErrorFamily) -> EmbeddError:
    what, code = failure
    resolution = _RESOLUTIONS.get(state) if family is SOURCE else None
    transient = _TRANSIENT.get(state) or _TRANSIENT.get(state[:2])
    if transient and state not in family.permanent:
        return family.unavailable(f"{what}: {transient} {code}.", resolution=resolution)
    reason = _PERMANENT.get(state) or _PERMANENT.get(state[:2]) or "the server refuses the statement"
    return family.rejected(f"{what}: {reason} {code}.", resolution=resolution or family.advice)


def access_denied(server: Server, relation: str | None, *, grant: str | None = None) -> SourceAccessDenied:
    """No right to read. The resolution is the statement that gives it."""
    grant = grant or f"GRANT SELECT ON {relation or '<table>'} TO {quoted(server.grantee)};"
    return SourceAccessDenied(
        f"The user {server.grantee!r} may not read {relation or 'a table'} in database {server.database!r}.",
        resolution=f"Run as the table's owner: {grant}",
    )


def write_denied(server: Server, role: str, what: str, grant: str | None = None) -> SourceAccessDenied:
    """No right to write. The resolution is the statement that gives it, if it is known."""
    return SourceAccessDenied(
        f"The user {role!r} may not write {what} in {server.address}.",
        resolution=f"Run as the owner or an administrator: {grant}" if grant else None,
    )


def login_denied(server: Server) -> SourceAccessDenied:
    """The server does not let this user in."""
    return SourceAccessDenied(
        f"PostgreSQL at {server} does not let user {server.user!r} into database {server.database!r}.",
        resolution="Check the connection's user and password, and that pg_hba.conf and the role's LOGIN right allow it.",
    )


def no_database(server: Server, family: ErrorFamily = SOURCE) -> EmbeddError:
    """The server answers, and does not have the database."""
    return family.rejected(
        f"There is no database {server.database!r} on PostgreSQL at {server}.",
        resolution="Correct the connection's `database`.",
    )


def connect_error(error: Exception, server: Server, password: str, family: ErrorFamily = SOURCE) -> EmbeddError:
    """Our error for a connection that could not be made."""
    if getattr(error, "sqlstate", None):
        return translate(error, server, family=family)
    text = str(error)
    if fault := method_fault(text, server.user):
        return SourceAccessDenied(f"No connection to PostgreSQL at {server}: {fault[0]}.", resolution=fault[1])
    if any(part in text for part in _DENIED_TEXTS):
        return login_denied(server)
    if f'database "{server.database}" does not exist' in text:
        return no_database(server, family)
    reason = (text.strip().splitlines() or ["it does not answer"])[0].removeprefix("connection failed: ").rstrip(".")
    if password and password in reason:
        reason = "it does not answer"
    if any(part in text for part in _REJECTED_TEXTS):
        return family.rejected(
            f"No connection to PostgreSQL at {server}: {reason}.",
            resolution="Correct the connection's `ssl_mode`, or the server's certificate.",
        )
    return family.unavailable(f"No connection to PostgreSQL at {server}: {reason}.")
