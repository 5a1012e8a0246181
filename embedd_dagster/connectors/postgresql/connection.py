"""Opens connections to a user's PostgreSQL: with which parameters, to which addresses, and with whose errors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypedDict

import psycopg

from embedd_dagster.connectors.network import AddressForbidden, NameUnknown, Resolver, resolve, vetted_addresses
from embedd_dagster.connectors.postgresql.credentials import Credentials, Server
from embedd_dagster.connectors.postgresql.errors import SOURCE, ErrorFamily, connect_error
from embedd_dagster.connectors.postgresql.login import accepted_methods, is_socket, socket_fault
from embedd_dagster.connectors.postgresql.sessions import ScopedConnection
from embedd_dagster.deadlines import DeadlineSource, no_deadline

_NO_FILE: Final = "/nonexistent/embedd"
_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "application_name": "embedd",
        "client_encoding": "UTF8",
        "options": "",  # otherwise PGOPTIONS of our own environment would count
        # a password or a certificate of the account that runs this service must not open a user's connection
        "passfile": _NO_FILE,
        "sslcert": _NO_FILE,
        "sslkey": _NO_FILE,
        "sslcertmode": "disable",
        "target_session_attrs": "any",
        "load_balance_hosts": "disable",
        "gssencmode": "disable",
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "autocommit": True,
        # a pooler such as PgBouncer may stand between, and plans must follow a growing table
        "prepare_threshold": None,
    }
)


class ConnectOptions(TypedDict, total=False):
    """The keyword arguments of `Dialer`."""

    connect_timeout_seconds: int
    deny_private_networks: bool
    allow_unix_sockets: bool
    silence_seconds: float
    current_deadline: DeadlineSource


class Dialer:
    """Opens connections with one set of credentials, and raises the errors of one family."""

    def __init__(
        self,
        credentials: Credentials,
        family: ErrorFamily,
        *,
        connect_timeout_seconds: int = 10,
        deny_private_networks: bool = False,
        allow_unix_sockets: bool = False,
        silence_seconds: float = 60.0,
        current_deadline: DeadlineSource = no_deadline,
    ) -> None:
        """Stores the options; nothing is connected to.

        Args:
            credentials: Where to connect to, and as whom.
            family: The errors to raise.
            connect_timeout_seconds: How long connecting to one address may take.
            deny_private_networks: Reject hosts in private networks; link-local and metadata addresses always are.
            allow_unix_sockets: Whether the host may be the directory of a Unix socket; then a password is needed.
            silence_seconds: After so long without a byte, the server is asked whether it still works.
            current_deadline: Returns the deadline of the present operation.
        """
        self.server = credentials.server
        self.current_deadline = current_deadline
        self._credentials = credentials
        self._family = family
        self._connect_timeout_seconds = connect_timeout_seconds
        self._deny_private_networks = deny_private_networks
        self._allow_unix_sockets = allow_unix_sockets
        self._silence_seconds = silence_seconds

    def open(self) -> ScopedConnection:
        """A new connection, which the caller configures and closes."""
        try:
            connection = self._dial()
        except psycopg.Error as error:
            raise connect_error(error, self.server, self._credentials.password, self._family) from None
        connection.longest_silence, connection.probe = self._silence_seconds, self._dial
        return connection

    def _dial(self) -> ScopedConnection:
        credentials, server = self._credentials, self.server
        connection = ScopedConnection.connect(
            **self._host_parameters(),
            dbname=server.database,
            user=server.user,
            password=credentials.password,
            sslmode=credentials.ssl_mode,
            require_auth=accepted_methods(credentials.password, credentials.ssl_mode),
            connect_timeout=self._connect_timeout_seconds,
            **_PARAMETERS,
        )
        connection.current_deadline = self.current_deadline
        return connection

    def _host_parameters(self) -> dict[str, Any]:
        """Makes libpq connect to the vetted addresses and nowhere else.

        The name stays next to each address: the server's certificate is checked against it.
        """
        server = self.server
        fault = socket_fault(server.host, self._credentials.password, allow_unix_sockets=self._allow_unix_sockets)
        if fault:
            raise self._family.rejected(fault[0], resolution=fault[1])
        if is_socket(server.host):
            return {"host": server.host, "port": server.port}
        found = allowed_addresses(server, self._family, deny_private_networks=self._deny_private_networks)
        return {"host": ",".join([server.host] * len(found)), "hostaddr": ",".join(found), "port": server.port}


def allowed_addresses(
    server: Server, family: ErrorFamily = SOURCE, *, deny_private_networks: bool, resolver: Resolver = resolve
) -> list[str]:
    """The addresses to connect to. Connect to these, not to the name: it could resolve differently the second time.

    Raises the family's `rejected` if an address is forbidden, and its `unavailable` if the name does not resolve.
    """
    host = server.host
    try:
        return vetted_addresses(host, server.port, deny_private_networks=deny_private_networks, resolver=resolver)
    except NameUnknown as error:
        raise family.unavailable(
            f"The host name {host!r} does not resolve: {error}.",
            resolution="Check the spelling of the connection's host, and the name server of this machine.",
        ) from None
    except AddressForbidden as error:
        message, resolution = error.for_host(host)
        raise family.rejected(message, resolution=resolution) from None
