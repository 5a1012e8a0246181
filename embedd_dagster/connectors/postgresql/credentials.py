"""The credentials of a connection to a user's PostgreSQL, and what messages may say of where they lead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from embedd_dagster.errors import ConfigurationError

DEFAULT_PORT: Final = 5432
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(slots=True)
class Server:
    """The database that a connection leads to, and its user: everything that messages may name."""

    host: str
    port: int
    database: str
    user: str
    role: str = ""
    """The role whose rights count, once connected: `ALTER ROLE … SET role` may make it another one than the user."""

    @property
    def grantee(self) -> str:
        """The role that a missing right has to be granted to."""
        return self.role or self.user

    @property
    def address(self) -> str:
        """Host, port and database."""
        return f"{self}/{self.database}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach a database. `repr` leaves the password out."""

    server: Server
    password: str = field(repr=False)
    ssl_mode: str

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """The stored credentials of a connection. Raises ConfigurationError, naming the field."""
        for name in ("host", "database", "user"):
            value = given.get(name)
            if not isinstance(value, str) or not value or "\x00" in value:
                raise ConfigurationError(f"credentials.{name}: a non-empty text is required.")
        password = given.get("password")
        if password is not None and (not isinstance(password, str) or "\x00" in password):
            raise ConfigurationError("credentials.password: a text is required.")
        if "," in given["host"]:  # libpq takes that for a list of hosts
            raise ConfigurationError("credentials.host: exactly one host is accepted.")
        port = given.get("port", DEFAULT_PORT)
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            raise ConfigurationError("credentials.port: a number from 1 to 65535 is required.")
        ssl_mode = given.get("ssl_mode") or "prefer"
        if ssl_mode not in _SSL_MODES:
            raise ConfigurationError(f"credentials.ssl_mode: one of {', '.join(_SSL_MODES)} is required.")
        return cls(Server(given["host"], port, given["database"], given["user"]), password or "", ssl_mode)
