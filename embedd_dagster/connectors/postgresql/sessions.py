"""Connections whose settings hold only inside their transactions.

Behind a pooler in transaction mode, such as PgBouncer, other clients use the same server session after us. A session-wide
`SET` would change their session: their INSERTs would fail in a read-only session. So every statement runs in a transaction
that begins with its own settings, and the session is left as it was.

One of these settings is the search path. Names in our SQL then mean PostgreSQL's own functions, operators and types, even
if another user has created functions of the same names in `public` (CVE-2018-1058). Objects of other schemas are named with
their schema.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Self, cast

import psycopg
from psycopg import pq, sql

from embedd_dagster.deadlines import Deadline
from embedd_dagster.errors import EmbeddError
from embedd_dagster.postgresql import BoundedConnection

PINNED_SEARCH_PATH: Final = "pg_catalog, pg_temp"
"""`pg_temp` is named because PostgreSQL would otherwise search it first."""

_NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})
_TRANSACTION_TIMEOUT: Final = 170000
_PROBE_SECONDS: Final = 20.0
# Not pinned, so every operator is named with its schema. Null if this role may not see what the other session does.
_IS_WORKING: Final = """
SELECT a.state OPERATOR(pg_catalog.=) 'active'
       AND (a.wait_event_type IS NULL OR a.wait_event_type OPERATOR(pg_catalog.<>) 'Client')
FROM pg_catalog.pg_stat_activity AS a WHERE a.pid OPERATOR(pg_catalog.=) %s::pg_catalog.int4
"""

# In one round trip. `reset_val` is what the role, the database and the server configure, even if another client of a pooler
# has set something else in the session. Between the two settings only a function that is named with its schema runs.
_ROLE_SCHEMAS: Final = (
    "SELECT pg_catalog.set_config('search_path', s.reset_val, true) FROM pg_catalog.pg_settings AS s"  # noqa: S608
    " WHERE s.name OPERATOR(pg_catalog.=) 'search_path'; "
    "SELECT pg_catalog.current_schemas(true); "
    f"SELECT pg_catalog.set_config('search_path', '{PINNED_SEARCH_PATH}', true)"
)


class ScopedCursor(psycopg.Cursor[Any]):
    """Runs each statement in a scope of its connection."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Self:
        """As psycopg's, in a transaction of its own unless one is open."""
        with cast("ScopedConnection", self.connection).scope():
            return super().execute(query, *args, **kwargs)

    def stream(self, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As psycopg's, in a transaction of its own unless one is open."""
        with cast("ScopedConnection", self.connection).scope():
            yield from super().stream(query, *args, **kwargs)


class ScopedConnection(BoundedConnection):
    """A connection in autocommit that never changes its session: see the module's text. Used by one thread at a time."""

    role: str | None = None
    """The role whose rights count: by `ALTER ROLE … SET role` another one than the user. None before the first scope."""
    server_pid: int | None = None
    """The server process of the last transaction. A pooler may give each transaction another one."""
    is_read_only = False
    settings: Mapping[str, str] = _NO_SETTINGS

    probe: Callable[[], ScopedConnection] | None = None
    """Opens another connection to the same server, by which it is asked what the process of a silent one does."""

    def is_still_working(self) -> bool:
        """Whether the server process of this connection still works on its statement, asked over another connection.

        Nothing comes for long while a server digests a large table. But a path that has stopped forwarding lets no second
        connection through; and if only the first is stuck, its process has ended the statement, or waits for us. A server
        or a pooler that answers without telling is believed to work: its own statement timeout ends the statement.
        """
        if self.probe is None:
            return False
        try:
            asked = self.probe()
        except psycopg.Error as error:
            return "FATAL" in str(error)  # an answer, such as that no connection is left
        except EmbeddError:
            return False
        deadline = Deadline(_PROBE_SECONDS)
        asked.current_deadline = lambda: deadline
        try:
            row = asked.execute(_IS_WORKING, [self.server_pid]).fetchone()
        except psycopg.Error:
            return not self.is_direct  # a pooler lets us in, and has no session left for this
        finally:
            asked.close()
        return row is not None and row[0] is not False

    def configure(self, settings: Mapping[str, str], *, read_only: bool) -> None:
        """Sets what every transaction from now on begins with."""
        self.cursor_factory = ScopedCursor
        if self.info.server_version >= _TRANSACTION_TIMEOUT:
            settings = {"transaction_timeout": "0", **settings}
        self.settings = {"search_path": PINNED_SEARCH_PATH, **settings}
        self.is_read_only = read_only

    @contextmanager
    def scope(self, settings: Mapping[str, str] = _NO_SETTINGS) -> Iterator[None]:
        """A transaction with the connection's settings and these; inside a transaction, a part of it."""
        if self.info.transaction_status is not pq.TransactionStatus.IDLE:
            if settings:
                set_local(self, settings)
            yield
            return
        try:
            self.begin(settings)
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()

    def begin(self, settings: Mapping[str, str] = _NO_SETTINGS) -> None:
        """Begins a transaction with the connection's settings and these, in one round trip."""
        # READ WRITE is said too: a role may have default_transaction_read_only, or another isolation level
        is_standby = self.info.parameter_status("in_hot_standby") == "on"  # which refuses READ WRITE itself
        mode = "READ ONLY" if self.is_read_only or is_standby else "READ WRITE"
        calls = settings_calls({**self.settings, **settings} if settings else self.settings)
        statement = (
            f"BEGIN ISOLATION LEVEL READ COMMITTED, {mode}; SELECT pg_catalog.pg_backend_pid(), CURRENT_USER, {calls}"
        )
        with psycopg.Cursor[Any](self) as cursor:
            cursor.execute(statement.encode())
            cursor.nextset()
            row = cursor.fetchone()
        if row is not None:
            role = row[1]
            self.server_pid, self.role = row[0], role if isinstance(role, str) else bytes(role).decode(errors="replace")

    def end(self) -> None:
        """Commits. The connection may have been closed in the middle of an answer: then there is nothing to commit."""
        if not self.closed:
            self.commit()

    def abandon(self) -> None:
        """Rolls back; closes the connection if it is in the middle of an answer."""
        if self.closed or self.info.transaction_status is pq.TransactionStatus.IDLE:
            return
        if self.info.transaction_status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
            with suppress(psycopg.Error):
                self.rollback()
                return
        self.close()

    @contextmanager
    def transaction(
        self,
        savepoint_name: str | None = None,
        force_rollback: bool = False,  # noqa: FBT001 - as psycopg's
    ) -> Generator[psycopg.Transaction, None, None]:
        """As psycopg's, inside a scope."""
        with self.scope(), super().transaction(savepoint_name, force_rollback) as transaction:
            yield transaction

    @property
    def is_direct(self) -> bool:
        """Whether this is the server's own session: a pooler invents the process number that it gives at the login."""
        return self.server_pid is not None and self.server_pid == self.info.backend_pid

    def execute_outside(self, statement: str | sql.Composed) -> None:
        """Runs a statement that cannot be in a transaction, such as VACUUM, under the session's own settings.

        Only for statements that name nothing without its schema.
        """
        with psycopg.Cursor[Any](self) as cursor:
            cursor.execute(statement.encode() if isinstance(statement, str) else statement)


def set_local(connection: psycopg.Connection[Any], settings: Mapping[str, str]) -> None:
    """Sets these server settings until the end of the transaction, in one round trip."""
    connection.execute(f"SELECT {settings_calls(settings)}")


def settings_calls(settings: Mapping[str, str]) -> str:
    """A select list that sets these until the end of the transaction."""
    return _settings_calls(tuple(settings.items()))


@lru_cache(maxsize=256)
def _settings_calls(settings: tuple[tuple[str, str], ...]) -> str:
    call = sql.SQL("pg_catalog.set_config({}, {}, true)")
    return sql.SQL(", ").join(call.format(*map(sql.Literal, pair)) for pair in settings).as_string(None)


def role_schemas(connection: psycopg.Connection[Any]) -> list[str]:
    """The schemas that the role's own search path leads to, in its order; `pg_catalog` is among them.

    Needs a transaction with a pinned search path, which is pinned again afterwards.
    """
    with connection.cursor() as cursor:
        cursor.execute(_ROLE_SCHEMAS)
        cursor.nextset()
        row = cursor.fetchone()
    return [name if isinstance(name, str) else bytes(name).decode(errors="replace") for name in (row[0] if row else ())]
