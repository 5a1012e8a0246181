"""Connections to somebody's PostgreSQL: how one is opened, what its session is set to, and the few that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Self

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.sql import Composable
from psycopg.types.string import TextLoader

from embedd_dagster.connectors.postgresql.credentials import Credentials
from embedd_dagster.connectors.postgresql.errors import connect_error, translated
from embedd_dagster.connectors.postgresql.hosts import allowed_addresses
from embedd_dagster.connectors.postgresql.login import accepted_methods, is_socket, socket_fault
from embedd_dagster.connectors.postgresql.pool import CONNECT_OPTIONS, SILENCE_SECONDS, ConnectionPool, host_parameters
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection, ScopedCursor
from embedd_dagster.core.json_text import load_json
from embedd_dagster.deadlines import Deadline, DeadlineSource, no_deadline
from embedd_dagster.errors import EmbeddError, SourceRejected, SourceUnavailable

_KEPT: Final = 4  # idle connections; as many as there are threads at work are open
_OLDEST_VERSION: Final = 140000  # bit_xor, and the last release that its makers support

# Of each transaction. Row hashes are made of the text of values: that text must be the same under every configuration of
# role, database and server.
_SETTINGS: Final = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmlbinary": "base64",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "jit": "off",  # compiling costs a page of 1,000 rows three times its reading
    # A table that was never analyzed looks so small that each page would sort its whole range: 5 times slower at 250,000
    # rows a range, and quadratic. What cannot do without a sort, such as some views, still gets one.
    "enable_sort": "off",
    "enable_bitmapscan": "off",
    "lock_timeout": "30s",  # behind an ALTER TABLE: say so, instead of hanging until the statement timeout
    "idle_in_transaction_session_timeout": "600s",  # while a caller works on the last rows of a statement
}
# Types that psycopg makes objects of, where the database's own text is what users know.
_AS_TEXT: Final = (
    "inet", "cidr",
    "interval",  # a timedelta has no months: one of 30 days would be the same
    "int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange",
    "int4multirange", "int8multirange", "nummultirange", "datemultirange", "tsmultirange", "tstzmultirange",
)  # fmt: skip


class Connections:
    """The open connections to one database. Safe to use from several threads."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        statement_timeout_seconds: float,
        connect_timeout_seconds: int,
        deny_private_networks: bool,
        allow_unix_sockets: bool = False,
        silence_seconds: float = SILENCE_SECONDS,
        current_deadline: DeadlineSource = no_deadline,
        settings: Mapping[str, str] = MappingProxyType({}),
        read_only: bool = True,
    ) -> None:
        """`settings` of a transaction win over those that every source has."""
        self.server = credentials.server
        self._read_only = read_only
        self._settings = settings
        self._credentials = credentials
        self._statement_timeout_seconds = statement_timeout_seconds
        self._connect_timeout_seconds = connect_timeout_seconds
        self._deny_private_networks = deny_private_networks
        self._allow_unix_sockets = allow_unix_sockets
        self._silence_seconds = silence_seconds
        self._current_deadline = current_deadline
        self._pool = ConnectionPool(
            self.open,
            kept=_KEPT,
            closed_error=lambda: SourceUnavailable(f"The source {self.server} has been closed."),
        )
        self.may_hold_invalid_text = False
        """Whether the database is of no encoding, so that text may be any bytes; known from the first connection on."""

    @contextmanager
    def borrow(self) -> Iterator[ScopedConnection]:
        """A working connection in a transaction, which ends with the block; closed when the block raises what is not ours."""
        connection = self._pool.take(ScopedConnection.begin)
        try:
            yield connection
            connection.end()
        except EmbeddError:  # what we found out by it, not what befell it
            connection.abandon()
            self._pool.give_back(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._pool.give_back(connection)

    def close(self) -> None:
        """All idle ones are closed now, borrowed ones when they come back. Idempotent."""
        self._pool.close()

    def open(self, deadline: Deadline | None = None) -> ScopedConnection:
        """A new connection, which the caller closes. Each of its statements is a transaction of its own by default.

        `deadline` bounds what is done to prepare it; by default the deadline of the present operation does.
        """
        server = self.server
        try:
            connection = self._dial()
        except psycopg.Error as error:
            raise connect_error(error, server, self._credentials.password) from None
        try:
            if deadline is not None:
                connection.current_deadline = lambda: deadline
            with translated(server):
                self._prepare(connection)
            connection.current_deadline = self._current_deadline
        except BaseException:
            connection.close()
            raise
        return connection

    def _dial(self) -> ScopedConnection:
        credentials, server = self._credentials, self.server
        connection = ScopedConnection.connect(
            **self._addresses(),
            dbname=server.database,
            user=server.user,
            password=credentials.password,
            sslmode=credentials.ssl_mode,
            require_auth=accepted_methods(credentials.password, credentials.ssl_mode),
            connect_timeout=self._connect_timeout_seconds,
            **CONNECT_OPTIONS,
        )
        connection.current_deadline = self._current_deadline
        return connection

    def _addresses(self) -> dict[str, Any]:
        server = self.server
        fault = socket_fault(server.host, self._credentials.password, allow_unix_sockets=self._allow_unix_sockets)
        if fault:
            raise SourceRejected(fault[0], resolution=fault[1])
        if is_socket(server.host):
            return {"host": server.host, "port": server.port}
        found = allowed_addresses(server.host, server.port, deny_private_networks=self._deny_private_networks)
        return host_parameters(server.host, server.port, found)

    def _prepare(self, connection: ScopedConnection) -> None:
        if connection.info.server_version < _OLDEST_VERSION:
            version = connection.info.server_version // 10000
            raise SourceRejected(
                f"PostgreSQL at {self.server} is version {version}; version 14 or newer is needed.",
                resolution="Upgrade the server, or replicate the table to a newer one.",
            )
        timeout = str(round(self._statement_timeout_seconds * 1000))
        settings = {**_SETTINGS, "statement_timeout": timeout, **self._settings}
        self.may_hold_invalid_text = connection.info.parameter_status("server_encoding") == "SQL_ASCII"
        if self.may_hold_invalid_text:
            # The server would refuse to send them as UTF-8. Only here, as each value costs a call into Python.
            settings["client_encoding"] = "SQL_ASCII"
        connection.configure(settings, read_only=self._read_only)
        connection.longest_silence, connection.probe = self._silence_seconds, self._dial
        for name in _AS_TEXT:
            connection.adapters.register_loader(name, TextLoader)
        connection.adapters.register_loader("json", _JsonLoader)
        connection.adapters.register_loader("jsonb", _JsonbLoader)
        if self.may_hold_invalid_text:
            connection.cursor_factory = _Utf8Cursor
            for kind in ("text", "varchar", "bpchar", "name", 0):  # 0: every type that the driver does not know
                connection.adapters.register_loader(kind, _ReplacingTextLoader)
        with connection.scope():  # which also tells its role
            self.server.role = connection.role or ""


class _Utf8Cursor(ScopedCursor):
    """Sends statements in UTF-8 over a connection without encoding, where the driver allows ASCII only."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Self:
        return super().execute(_encoded(query), *args, **kwargs)

    def stream(self, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return super().stream(_encoded(query), *args, **kwargs)


def _encoded(query: Any) -> bytes:
    return (query.as_string(None) if isinstance(query, Composable) else str(query)).encode()


class _ReplacingTextLoader(Loader):
    """Text, with U+FFFD for what is not UTF-8."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode(errors="replace")


class _JsonLoader(Loader):
    """JSON with every number as it is, or the text itself where no Python object tells as much."""

    has_unique_keys = False

    def load(self, data: Buffer) -> Any:
        try:
            document = bytes(data).decode()
        except UnicodeDecodeError:
            return bytes(data).decode(errors="replace")
        return load_json(document, has_unique_keys=self.has_unique_keys)


class _JsonbLoader(_JsonLoader):
    has_unique_keys = True
