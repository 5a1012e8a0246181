"""The database of a platform store: its transactions, what is retried in them, and its errors as ours."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Final, TypeVar, Unpack

import psycopg
from psycopg import sql

from embedd_dagster.connectors.postgresql.connection import ConnectOptions, Dialer
from embedd_dagster.connectors.postgresql.credentials import Credentials
from embedd_dagster.connectors.postgresql.errors import STORE, translate, write_denied
from embedd_dagster.connectors.postgresql.pool import ConnectionPool
from embedd_dagster.connectors.postgresql.sessions import PINNED_SEARCH_PATH, ScopedConnection, settings_calls
from embedd_dagster.errors import EmbeddError, VectorStoreRejected, VectorStoreUnavailable
from embedd_dagster.postgresql import Connection

Result = TypeVar("Result")

_KEPT: Final = 8
_CONFLICT_ATTEMPTS: Final = 12
# Of each transaction, instead of the role's own settings, which are made for its other programs.
_SETTINGS: Final = {"statement_timeout": "600s", "lock_timeout": "30s", "idle_in_transaction_session_timeout": "600s"}

_BAD_VALUE: Final = "22"
"""The class of errors that are about one value of a statement, and nothing else."""
_BAD_VECTOR: Final = "22000"
"""pgvector's own, for example for another number of dimensions: an error of the whole batch."""
_NOT_ENCODABLE: Final = frozenset({"22P05", "22021"})


class TableMissing(VectorStoreRejected):
    """The table of a vector set does not exist."""


class ValueRejected(VectorStoreRejected):
    """This database cannot hold a value of the statement."""


class Database:
    """Connections to one database. Safe to use from several threads; nothing is connected to before the first use."""

    def __init__(
        self,
        credentials: Mapping[str, Any],
        *,
        lock_attempt_seconds: float = 2.0,
        lock_seconds: float = 30.0,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """`lock_attempt_seconds` and `lock_seconds`: see `with_locks`. Raises ConfigurationError."""
        parsed = Credentials.parse(credentials)
        self.server = parsed.server
        self._lock_attempt_seconds = lock_attempt_seconds
        self._lock_seconds = lock_seconds
        self._dialer = Dialer(parsed, STORE, **options)
        self._readers = threading.BoundedSemaphore(_KEPT)
        self._pool = ConnectionPool(
            self._open, kept=_KEPT, closed_error=lambda: VectorStoreUnavailable("The vector store has been closed.")
        )

    @property
    def address(self) -> str:
        """Host, port and database."""
        return self.server.address

    @contextmanager
    def transaction(
        self, *, timeout_seconds: float | None = None, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[ScopedConnection]:
        """A transaction: committed at the end of the block, rolled back when it raises.

        psycopg's errors leave the block as ours. `timeout_seconds` applies to each statement: ten minutes by default, 0 for
        none. `settings` of the server hold until the end of the transaction.
        """
        if timeout_seconds is not None:
            settings = {"statement_timeout": f"{int(timeout_seconds * 1000)}ms", **settings}
        try:
            with self._pool.transaction(settings) as connection:
                yield connection
        except psycopg.Error as error:
            raise self.translate(error) from None

    def vacuum(self, table: sql.Identifier) -> None:
        """Vacuums the table, which cannot be done in a transaction.

        It makes index-only scans possible at once; autovacuum does the same later. So a timeout that the role has for all of
        its statements may end it: nothing but time is lost.
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
        """The rows of one SELECT under these settings of the server, in one round trip.

        Statements that are sent together are one transaction. A connection that was lost while it was idle is replaced, and
        the SELECT is repeated. Only a few run at once: more would only share the server's processors.
        """
        settings = {
            "search_path": PINNED_SEARCH_PATH,
            "statement_timeout": f"{int(timeout_seconds * 1000)}ms",
            **settings,
        }
        both = sql.SQL("SELECT {}; {}").format(sql.SQL(settings_calls(settings)), statement)
        if not self._readers.acquire(timeout=timeout_seconds):
            raise VectorStoreUnavailable(f"Too many concurrent searches on PostgreSQL at {self.address}; try again.")
        try:
            for is_last in (False, True):
                connection = self._pool.take(_require_answer if is_last else None)
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

        Each attempt waits `lock_attempt_seconds` for the lock, as queries queue up behind it; attempts go on for
        `lock_seconds`.
        """
        give_up_at = time.monotonic() + self._lock_seconds
        while True:
            try:
                with self._pool.transaction(
                    {"lock_timeout": f"{round(self._lock_attempt_seconds * 1000)}ms"}
                ) as connection:
                    return action(connection)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
                if time.monotonic() > give_up_at:
                    raise self.translate(error) from None
            except psycopg.Error as error:
                raise self.translate(error) from None
            time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - jitter, not a secret

    def retrying_conflicts(self, action: Callable[[Connection], Result]) -> Result:
        """The result of a transaction that another writer of the same keys may disturb."""
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                with self._pool.transaction() as connection:
                    return action(connection)
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected) as error:
                if attempt == _CONFLICT_ATTEMPTS:
                    raise self.translate(error) from None
            except psycopg.Error as error:
                raise self.translate(error) from None
            time.sleep(random.uniform(0, 0.02 * attempt))  # noqa: S311 - jitter, not a secret
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes idle connections now, and borrowed ones when they come back. Idempotent."""
        self._pool.close()

    def translate(self, error: psycopg.Error) -> EmbeddError:
        """Our error for one of psycopg's."""
        state = error.sqlstate or ""
        code = f"{type(error).__name__}, SQLSTATE {state}"
        if state == "42P01":
            return TableMissing(f"A vector set's table is not in the database {self.address} ({code}).")
        if state == "42501":
            return write_denied(self.server, self.server.user, "the objects of its vector tables")
        if state.startswith(_BAD_VALUE) and state != _BAD_VECTOR:
            reason = "PostgreSQL cannot hold a value of it"
            if state in _NOT_ENCODABLE:
                reason = "its encoding does not have one of the characters"
            return ValueRejected(f"The database {self.address} cannot hold it: {reason} ({code}).")
        return translate(error, self.server, family=STORE)

    def _open(self) -> ScopedConnection:
        connection = self._dialer.open()
        connection.configure(_SETTINGS, read_only=False)
        return connection


def _require_answer(connection: Connection) -> None:
    connection.execute("")
