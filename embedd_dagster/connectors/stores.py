"""Vector stores, one backend each; `open_qdrant` and `open_platform_store` are the registry.

A backend's SDK is imported when one of it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from embedd_dagster.deadlines import DeadlineSource, no_deadline
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.store import PlatformStore, Store


def open_qdrant(url: str, api_key: str | None = None, *, read_timeout_seconds: float | None = None) -> Store:
    """Our own Qdrant (managed mode), which is connected to when it is first used; to be closed.

    A search waits `read_timeout_seconds`, half a minute where that is not given. Raises ConfigurationError for what is no URL.
    """
    from embedd_dagster.connectors.qdrant.store import QdrantStore

    return QdrantStore(url, api_key, read_timeout_seconds=read_timeout_seconds)


def open_platform_store(
    provider: str,
    credentials: Mapping[str, Any],
    schema: str | None = None,
    *,
    deny_private_networks: bool = False,
    allow_unix_sockets: bool = False,
    silence_seconds: float = 60.0,
    connect_timeout_seconds: int = 10,
    current_deadline: DeadlineSource = no_deadline,
) -> PlatformStore:
    """The store inside a source database (platform mode), which is connected to when it is first used; to be closed.

    Args:
        provider: One of `PLATFORM_PROVIDERS`.
        credentials: As the API takes them for this provider.
        schema: Where new vector tables go; by default the first schema of the search path that may be written.
        deny_private_networks: Refuse hosts in private networks; link-local and metadata addresses always are.
        allow_unix_sockets: Whether the host may be the directory of a Unix socket; then a password is needed.
        silence_seconds: After so long without a byte, the server is asked whether it still works.
        connect_timeout_seconds: What connecting may take, an address.
        current_deadline: Says until when the present operation may wait for the database.

    Raises:
        ConfigurationError: The provider has no platform store, or a credential is missing.
    """
    if provider not in _PLATFORM_STORES:
        raise ConfigurationError(
            f"{provider!r} has no platform store.", resolution=f"Known providers: {', '.join(PLATFORM_PROVIDERS)}."
        )
    return _PLATFORM_STORES[provider](
        credentials,
        schema,
        deny_private_networks,
        allow_unix_sockets,
        silence_seconds,
        connect_timeout_seconds,
        current_deadline,
    )


def _open_pgvector(
    credentials: Mapping[str, Any],
    schema: str | None,
    deny_private_networks: bool,  # noqa: FBT001
    allow_unix_sockets: bool,  # noqa: FBT001
    silence_seconds: float,
    connect_timeout_seconds: int,
    current_deadline: DeadlineSource,
) -> PlatformStore:
    from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore

    return PgvectorStore(
        credentials,
        schema,
        deny_private_networks=deny_private_networks,
        allow_unix_sockets=allow_unix_sockets,
        silence_seconds=silence_seconds,
        connect_timeout_seconds=connect_timeout_seconds,
        current_deadline=current_deadline,
    )


_OpenPlatformStore = Callable[[Mapping[str, Any], str | None, bool, bool, float, int, DeadlineSource], PlatformStore]
_PLATFORM_STORES: Final[dict[str, _OpenPlatformStore]] = {
    "postgresql": _open_pgvector,
}
PLATFORM_PROVIDERS: Final = tuple(_PLATFORM_STORES)
"""The source providers whose database can hold vectors."""
