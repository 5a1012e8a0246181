"""The user's own PostgreSQL: connections, transactions, and its errors as ours."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Final, TypeVar

import psycopg
from psycopg import sql

from embedd_dagster.connectors import network
from embedd_dagster.connectors.postgresql.login import accepted_methods, is_socket, method_fault, socket_fault
from embedd_dagster.connectors.postgresql.pool import CONNECT_OPTIONS, SILENCE_SECONDS, ConnectionPool, host_parameters
from embedd_dagster.connectors.postgresql.sessions import PINNED_SEARCH_PATH, ScopedConnection, settings_calls
from embedd_dagster.deadlines import DeadlineSource, no_deadline
from embedd_dagster.errors import (
    ConfigurationError,
    EmbeddError,
    SourceAccessDenied,
    VectorStoreRejected,
    VectorStoreUnavailable,
)
from embedd_dagster.postgresql import Connection

Result = TypeVar("Result")

_KEPT: Final = 8  # idle connections; as many as there are threads at work are open
_CONNECT_SECONDS: Final = 10
_LOCK_SECONDS: Final = 2
_LOCK_PATIENCE_SECONDS: Final = 30.0
_CONFLICT_ATTEMPTS: Final = 12
# Of each transaction, instead of the role's own settings, which are made for its other programs.
_SETTINGS: Final = {"statement_timeout": "600s", "lock_timeout": "30s", "idle_in_transaction_session_timeout": "600s"}

# By SQLSTATE or by its class: what passes by itself.
_TRANSIENT: Final = frozenset({"08", "23505", "40", "53", "57", "55P03", "58", "25P03", "25P04"})
# Needs somebody: a full disk, a limit of the configuration, a database that was dropped.
_NOT_TRANSIENT: Final = frozenset({"53100", "53400", "57P04"})
_NO_CHARACTER: Final = "its encoding does not have one of the characters"
_REFUSAL_REASONS: Final = {
    "22P05": _NO_CHARACTER,
    "22021": _NO_CHARACTER,
}
_BAD_VALUE: Final = "22"
"""The class of errors that are about one value of a statement, and nothing else."""
_BAD_VECTOR: Final = "22000"
"""pgvector's own: such as of another number of dimensions, which is a fault of all of a batch."""
# libpq gives no SQLSTATE for a connection that cannot be made, only English text
_DENIED: Final = ("authentication failed", "no password supplied", 'role "', "pg_hba.conf", "not permitted to log in")
_REJECTED: Final = ("does not support SSL", "certificate", 'database "', "is not currently accepting")


class TableMissing(VectorStoreRejected):
    """The table of a vector set is not there (any more)."""


class ValueRefused(VectorStoreRejected):
    """A value of the statement cannot be held by this database."""


class Database:
    """Connections to one database. Safe to use from several threads; nothing is connected to before the first use."""

    def __init__(
        self,
        credentials: Mapping[str, Any],
        *,
        deny_private_networks: bool = False,
        allow_unix_sockets: bool = False,
        silence_seconds: float = SILENCE_SECONDS,
        current_deadline: DeadlineSource = no_deadline,
    ) -> None:
        try:
            self._host, self._port = str(credentials["host"]), int(credentials.get("port") or 5432)
            self._parameters: dict[str, Any] = {
                "dbname": credentials["database"],
                "user": credentials["user"],
                "password": credentials.get("password") or "",
                "sslmode": credentials.get("ssl_mode") or "prefer",
            }
        except KeyError as error:
            raise ConfigurationError(f"credentials.{error.args[0]}: required.") from None
        if not self._host or "," in self._host:  # libpq takes these for its default, and for a list
            raise ConfigurationError("credentials.host: exactly one host is required.")
        self._parameters["require_auth"] = accepted_methods(self._parameters["password"], self._parameters["sslmode"])
        self._allow_unix_sockets = allow_unix_sockets
        self._silence_seconds = silence_seconds
        self._current_deadline = current_deadline
        self.user = str(self._parameters["user"])
        self.address = f"{self._host}:{self._port}/{self._parameters['dbname']}"
        self._deny_private_networks = deny_private_networks
        self._readers = threading.BoundedSemaphore(_KEPT)
        self._pool = ConnectionPool(
            self._open, kept=_KEPT, closed_error=lambda: VectorStoreUnavailable("The vector store has been closed.")
        )

    @contextmanager
    def transaction(
        self, *, timeout_seconds: float | None = None, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[ScopedConnection]:
        """A transaction of its own: committed at the end of the block, rolled back when it raises.

        psycopg's errors leave the block as ours. `timeout_seconds` of each statement: ten minutes by default, 0 for none.
        `settings` of the server hold until its end.
        """
        if timeout_seconds is not None:
            settings = {"statement_timeout": f"{int(timeout_seconds * 1000)}ms", **settings}
        try:
            with self._transaction(settings) as connection:
                yield connection
        except psycopg.Error as error:
            raise self.translate(error) from None

    @contextmanager
    def _transaction(self, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[ScopedConnection]:
        connection = self._pool.take(lambda taken: taken.begin(settings))
        try:
            yield connection
            connection.end()
        except (EmbeddError, psycopg.Error):
            connection.abandon()
            self._pool.give_back(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._pool.give_back(connection)

    def vacuum(self, table: sql.Identifier) -> None:
        """Vacuums the table, which cannot be done in a transaction.

        It makes index-only scans possible at once, and autovacuum will do it later in any case. So a timeout that the role
        has for all of its statements may end it, and nothing is lost but time.
        """
        connection = self._pool.take(ScopedConnection.begin)
        try:
            connection.end()
            with suppress(psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
                connection.execute_outside(sql.SQL("VACUUM {}").format(table))
        except psycopg.Error as error:
            raise self.translate(error) from None
        finally:
            self._pool.give_back(connection)

    def read(self, statement: sql.Composed, *, timeout_seconds: float, settings: Mapping[str, str]) -> list[Any]:
        """The rows of one SELECT under these settings of the server, which hold for it alone: one round trip.

        Statements that are sent together are one transaction. A connection that was lost while it was idle is replaced,
        and the question asked again. A few are asked at a time: more would only share the server's processors.
        """
        settings = {
            "search_path": PINNED_SEARCH_PATH,
            "statement_timeout": f"{int(timeout_seconds * 1000)}ms",
            **settings,
        }
        both = sql.SQL("SELECT {}; {}").format(sql.SQL(settings_calls(settings)), statement)
        if not self._readers.acquire(timeout=timeout_seconds):
            raise VectorStoreUnavailable(f"PostgreSQL at {self.address} has no time for another search.")
        try:
            for is_last in (False, True):
                connection = self._pool.take(_answers if is_last else None)
                try:
                    with psycopg.Cursor[Any](connection) as cursor:  # what is sent together is a scope by itself
                        cursor.execute(both)
                        cursor.nextset()
                        return cursor.fetchall()
                except psycopg.Error as error:
                    if is_last or not connection.closed:
                        raise self.translate(error) from None
                finally:
                    self._pool.give_back(connection)
        finally:
            self._readers.release()
        raise AssertionError("unreachable")

    def with_locks(self, action: Callable[[Connection], Result]) -> Result:
        """The result of a transaction that needs a table's or view's lock.

        It waits only moments for the lock, as queries queue up behind it, and tries again for half a minute.
        """
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                with self._transaction({"lock_timeout": f"{_LOCK_SECONDS}s"}) as connection:
                    return action(connection)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
                if time.monotonic() > deadline:
                    raise self.translate(error) from None
            except psycopg.Error as error:
                raise self.translate(error) from None
            time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - jitter, no secret

    def retrying_conflicts(self, action: Callable[[Connection], Result]) -> Result:
        """The result of a transaction that another writer of the same keys may disturb."""
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                with self._transaction() as connection:
                    return action(connection)
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected) as error:
                if attempt == _CONFLICT_ATTEMPTS:
                    raise self.translate(error) from None
            except psycopg.Error as error:
                raise self.translate(error) from None
            time.sleep(random.uniform(0, 0.02 * attempt))  # noqa: S311 - jitter, no secret
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Idle connections are closed now, borrowed ones when they come back. Idempotent."""
        self._pool.close()

    def translate(self, error: psycopg.Error) -> EmbeddError:
        """Our error for one of psycopg's. A server's text may quote a row, so only the name of the error is passed on."""
        state = error.sqlstate
        if not state:
            if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
                return VectorStoreUnavailable(f"The connection to PostgreSQL at {self.address} was lost.")
            return VectorStoreRejected(f"PostgreSQL at {self.address}: {type(error).__name__}.")
        name = f"{type(error).__name__}, SQLSTATE {state}"
        if state == "42P01":
            return TableMissing(f"A vector set's table is not in the database {self.address} ({name}).")
        if state == "42501":
            return access_denied(self.user, self.address, "the objects of its vector tables")
        if not {state, state[:2]} & _TRANSIENT or state in _NOT_TRANSIENT:
            return self._refusal(state, name)
        return VectorStoreUnavailable(f"PostgreSQL at {self.address} is busy or unavailable: {name}.")

    def _refusal(self, state: str, name: str) -> VectorStoreRejected:
        if state.startswith(_BAD_VALUE) and state != _BAD_VECTOR:
            reason = _REFUSAL_REASONS.get(state, "a value of it is not one that PostgreSQL can hold")
            return ValueRefused(f"The database {self.address} cannot hold it: {reason} ({name}).")
        return VectorStoreRejected(
            f"PostgreSQL at {self.address} refuses: {name}.", resolution="Look at the database server's log."
        )

    def _open(self) -> ScopedConnection:
        try:
            connection = self._dial()
        except psycopg.Error as error:
            raise self._connect_error(error) from None
        connection.configure(_SETTINGS, read_only=False)
        connection.longest_silence, connection.probe = self._silence_seconds, self._dial
        return connection

    def _dial(self) -> ScopedConnection:
        connection = ScopedConnection.connect(
            **self._parameters, **self._addresses(), connect_timeout=_CONNECT_SECONDS, **CONNECT_OPTIONS
        )
        connection.current_deadline = self._current_deadline
        return connection

    def _addresses(self) -> dict[str, Any]:
        host, port = self._host, self._port
        fault = socket_fault(host, self._parameters["password"], allow_unix_sockets=self._allow_unix_sockets)
        if fault:
            raise VectorStoreRejected(fault[0], resolution=fault[1])
        if is_socket(host):
            return {"host": host, "port": port}
        try:
            found = network.vetted_addresses(host, port, deny_private_networks=self._deny_private_networks)
        except network.NameUnknown as error:
            raise VectorStoreUnavailable(f"The host name {host!r} does not resolve: {error}.") from None
        except network.AddressForbidden as error:
            raise VectorStoreRejected(
                f"The host {host!r} leads to {error}, to which this service does not connect.",
                resolution="Use a host that is reachable under a public address, or ask the operator of this service.",
            ) from None
        return host_parameters(host, port, found)

    def _connect_error(self, error: psycopg.Error) -> EmbeddError:
        text = str(error)
        if fault := method_fault(text, self.user):
            return SourceAccessDenied(
                f"No connection to PostgreSQL at {self.address}: {fault[0]}.", resolution=fault[1]
            )
        if any(part in text for part in _DENIED):
            return SourceAccessDenied(
                f"PostgreSQL at {self.address} does not let user {self.user!r} in.",
                resolution="Check the connection's user and password, and that pg_hba.conf lets them in.",
            )
        kind = VectorStoreRejected if any(part in text for part in _REJECTED) else VectorStoreUnavailable
        reason = (text.strip().splitlines() or ["no answer"])[0].removeprefix("connection failed: ").rstrip(".")
        password = self._parameters["password"]
        if password and password in reason:
            reason = "no answer"
        return kind(f"No connection to PostgreSQL at {self.address}: {reason}.")


def _answers(connection: Connection) -> None:
    connection.execute("")


def access_denied(user: str, address: str, what: str, grant: str | None = None) -> SourceAccessDenied:
    """A missing right; the resolution is the statement that gives it, where it is known."""
    return SourceAccessDenied(
        f"The user {user!r} may not write {what} in {address}.",
        resolution=f"Run as the owner or an administrator: {grant}" if grant else None,
    )


def quoted(identifier: str) -> str:
    """The identifier as SQL text for people; statements that are run use psycopg.sql."""
    return '"' + identifier.replace('"', '""') + '"'
