"""The connection to the catalog: one engine a process, one transaction a unit of work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from embedd_dagster.catalog.lookups import Lookups
from embedd_dagster.deadlines import current_deadline
from embedd_dagster.errors import CatalogUnavailable
from embedd_dagster.postgresql import BoundedConnection

_LOOKUP_CONNECTIONS = 8
_SILENCE_SECONDS = 45.0  # a server that works ends every statement after 30, by the timeout below
_CONNECT_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "embedd-catalog",
    # a hung statement must not take a worker hostage
    "options": "-c statement_timeout=30000 -c lock_timeout=10000 -c timezone=UTC",
}


def _connect_bounded(
    _dialect: Any, _record: Any, args: Sequence[Any], parameters: Mapping[str, Any]
) -> BoundedConnection:
    connection = BoundedConnection.connect(*args, **parameters)
    connection.longest_silence, connection.current_deadline = _SILENCE_SECONDS, current_deadline
    return connection


class Catalog:
    """The catalog's database. Safe to use from several threads; connections are pooled and checked before use."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        self._engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            pool_timeout=10,
            connect_args=_CONNECT_ARGUMENTS,
        )
        event.listen(self._engine, "do_connect", _connect_bounded)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        self.lookups = Lookups(self._connect, size=_LOOKUP_CONNECTIONS)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction: committed at the end, rolled back on any exception. Raises CatalogUnavailable."""
        try:
            with self._sessions.begin() as session:
                yield session
        except OperationalError as error:
            raise CatalogUnavailable("The catalog database does not answer.") from error
        except PoolTimeoutError as error:
            raise CatalogUnavailable("Every connection to the catalog database is in use.") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise CatalogUnavailable("The connection to the catalog database was lost.") from error
            raise

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        _, address = self._engine.dialect.create_connect_args(self._engine.url)
        return _connect_bounded(None, None, (), {**address, **_CONNECT_ARGUMENTS, "autocommit": True})

    def check(self) -> None:
        """Returns when the catalog answers."""
        with self.transaction() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Gives connections back."""
        self.lookups.close()
        self._engine.dispose()
