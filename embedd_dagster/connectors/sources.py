"""Source databases, one file each; `open_source` is the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from embedd_dagster.deadlines import DeadlineSource, no_deadline
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.source import Source

PROVIDERS: Final = ("postgresql",)
"""The providers that `open_source` knows."""


def open_source(
    provider: str,
    credentials: Mapping[str, Any],
    *,
    statement_timeout_seconds: float = 3600,
    connect_timeout_seconds: int = 10,
    deny_private_networks: bool = False,
    allow_unix_sockets: bool = False,
    silence_seconds: float = 60.0,
    current_deadline: DeadlineSource = no_deadline,
) -> Source:
    """The source of this provider, which connects when it is first used; to be closed.

    Args:
        provider: One of `PROVIDERS`.
        credentials: As the API takes them for this provider.
        statement_timeout_seconds: What one statement may take. A digest is one statement over the whole table.
        connect_timeout_seconds: What connecting may take, an address.
        deny_private_networks: Whether hosts in private networks are refused: for an installation whose users are not its
            operators. Link-local addresses and metadata services are refused always.
        allow_unix_sockets: Whether the host may be the directory of a Unix socket; then a password is needed.
        silence_seconds: After so long without a byte, the server is asked whether it still works.
        current_deadline: Says until when the present operation may wait for the source.

    Raises:
        ConfigurationError: The provider is unknown, or a credential is missing or malformed.
    """
    if provider == "postgresql":
        from embedd_dagster.connectors.postgresql.source import PostgresSource

        return PostgresSource(
            credentials,
            statement_timeout_seconds=statement_timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            deny_private_networks=deny_private_networks,
            allow_unix_sockets=allow_unix_sockets,
            silence_seconds=silence_seconds,
            current_deadline=current_deadline,
        )
    raise ConfigurationError(
        f"{provider!r} is no known source provider.", resolution=f"Known providers: {', '.join(PROVIDERS)}."
    )
