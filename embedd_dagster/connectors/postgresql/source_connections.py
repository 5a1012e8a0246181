"""The connections of a source: their settings, how their values are loaded, and the few that are kept open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Final, Self, Unpack

from psycopg.adapt import Buffer, Loader
from psycopg.sql import Composable
from psycopg.types.string import TextLoader

from embedd_dagster.connectors.postgresql.connection import ConnectOptions, Dialer
from embedd_dagster.connectors.postgresql.credentials import Credentials
from embedd_dagster.connectors.postgresql.errors import SOURCE, translated
from embedd_dagster.connectors.postgresql.pool import ConnectionPool
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection, ScopedCursor
from embedd_dagster.core.json_text import load_json
from embedd_dagster.deadlines import Deadline
from embedd_dagster.errors import SourceRejected, SourceUnavailable

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
    "idle_in_transaction_session_timeout": "600s",  # while a caller works on the last rows of a statement
}
# Types that psycopg makes objects of, where the database's own text is what users know.
_AS_TEXT: Final = (
    "inet", "cidr",
    "interval",  # a timedelta has no months: one of 30 days would be the same
    "int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange",
    "int4multirange", "int8multirange", "nummultirange", "datemultirange", "tsmultirange", "tstzmultirange",
)  # fmt: skip


class SourceConnections:
    """The open connections to one source. Safe to use from several threads."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        statement_timeout_seconds: float,
        settings: Mapping[str, str] = MappingProxyType({}),
        read_only: bool = True,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """`settings` of each transaction take precedence over those that every source has."""
        self.server = credentials.server
        self._dialer = Dialer(credentials, SOURCE, **options)
        self._read_only = read_only
        self._settings = {
            **_SETTINGS, "statement_timeout": str(round(statement_timeout_seconds * 1000)), **settings
        }  # fmt: skip
        self._pool = ConnectionPool(
            self.open, closed_error=lambda: SourceUnavailable(f"The source {self.server} has been closed.")
        )
        self.may_hold_invalid_text = False
        """Whether the database has no encoding, so that text may be any bytes. Known after the first connection."""

    def borrow(self) -> AbstractContextManager[ScopedConnection]:
        """A working connection in a transaction, which ends with the block."""
        return self._pool.transaction()

    def close(self) -> None:
        """Closes idle connections now, and borrowed ones when they come back. Idempotent."""
        self._pool.close()

    def open(self, deadline: Deadline | None = None) -> ScopedConnection:
        """A new connection, which the caller closes. Each of its statements is its own transaction by default.

        `deadline` applies until the connection is ready; None: the deadline of the present operation.
        """
        connection = self._dialer.open()
        try:
            if deadline is not None:
                connection.current_deadline = lambda: deadline
            with translated(self.server):
                self._prepare(connection)
            connection.current_deadline = self._dialer.current_deadline
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: ScopedConnection) -> None:
        if connection.info.server_version < _OLDEST_VERSION:
            version = connection.info.server_version // 10000
            raise SourceRejected(
                f"PostgreSQL at {self.server} is version {version}; version 14 or newer is needed.",
                resolution="Upgrade the server, or replicate the table to a newer one.",
            )
        settings = dict(self._settings)
        self.may_hold_invalid_text = connection.info.parameter_status("server_encoding") == "SQL_ASCII"
        if self.may_hold_invalid_text:
            # The server would refuse to send it as UTF-8. Only then, as each value costs a call into Python.
            settings["client_encoding"] = "SQL_ASCII"
        connection.configure(settings, read_only=self._read_only)
        for name in _AS_TEXT:
            connection.adapters.register_loader(name, TextLoader)
        connection.adapters.register_loader("json", _JsonLoader)
        connection.adapters.register_loader("jsonb", _JsonbLoader)
        if self.may_hold_invalid_text:
            connection.cursor_factory = _Utf8Cursor
            for kind in ("text", "varchar", "bpchar", "name", 0):  # 0: every type that the driver does not know
                connection.adapters.register_loader(kind, _ReplacingTextLoader)
        with connection.scope():  # which also reads its role
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
    """JSON with every number as it is, or the text itself if a Python object would lose something."""

    has_unique_keys = False

    def load(self, data: Buffer) -> Any:
        try:
            document = bytes(data).decode()
        except UnicodeDecodeError:
            return bytes(data).decode(errors="replace")
        return load_json(document, has_unique_keys=self.has_unique_keys)


class _JsonbLoader(_JsonLoader):
    has_unique_keys = True
