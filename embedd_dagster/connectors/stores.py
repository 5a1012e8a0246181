"""Vector stores, one backend each; `open_qdrant` and `open_platform_store` are the registry.

A backend's SDK is imported when one of it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.store import PlatformStore, Store


def open_qdrant(
    url: str, api_key: str | None = None, *, grpc_port: int | None = None, read_timeout_seconds: float | None = None
) -> Store:
    """Our own Qdrant (managed mode), which is connected to when it is first used; to be closed.

    Args:
        url: Its REST interface.
        api_key: For REST and gRPC.
        grpc_port: Its gRPC port at the same host, for bulk writes; None or 0: REST alone.
        read_timeout_seconds: The timeout of a search, half a minute by default.

    Raises:
        ConfigurationError: `url` is not a URL.
    """
    from embedd_dagster.connectors.qdrant.store import QdrantStore

    return QdrantStore(url, api_key, grpc_port=grpc_port, read_timeout_seconds=read_timeout_seconds)


def open_platform_store(
    provider: str,
    credentials: Mapping[str, Any],
    schema: str | None = None,
    *,
    deny_private_networks: bool = False,
    allow_unix_sockets: bool = False,
    silence_seconds: float = 60.0,
) -> PlatformStore:
    """The store inside a source database (platform mode), which is connected to when it is first used; to be closed.

    Args:
        provider: One of `PLATFORM_PROVIDERS`.
        credentials: As the API takes them for this provider.
        schema: Where new vector tables go; by default the first schema of the search path that may be written.
        deny_private_networks: Refuse hosts in private networks; link-local and metadata addresses always are.
        allow_unix_sockets: Whether the host may be the directory of a Unix socket; then a password is needed.
        silence_seconds: After so long without a byte, the server is asked whether it still works.

    Raises:
        ConfigurationError: The provider has no platform store, or a credential is missing.
    """
    if provider not in _PLATFORM_STORES:
        raise ConfigurationError(
            f"{provider!r} has no platform store.", resolution=f"Known providers: {', '.join(PLATFORM_PROVIDERS)}."
        )
    return _PLATFORM_STORES[provider](credentials, schema, deny_private_networks, allow_unix_sockets, silence_seconds)


def _open_pgvector(
    credentials: Mapping[str, Any],
    schema: str | None,
    deny_private_networks: bool,  # noqa: FBT001
    allow_unix_sockets: bool,  # noqa: FBT001
    silence_seconds: float,
) -> PlatformStore:
    from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore

    return PgvectorStore(
        credentials,
        schema,
        deny_private_networks=deny_private_networks,
        allow_unix_sockets=allow_unix_sockets,
        silence_seconds=silence_seconds,
    )


_PLATFORM_STORES: Final[dict[str, Callable[[Mapping[str, Any], str | None, bool, bool, float], PlatformStore]]] = {
    "postgresql": _open_pgvector,
}
PLATFORM_PROVIDERS: Final = tuple(_PLATFORM_STORES)
"""The source providers whose database can hold vectors."""
