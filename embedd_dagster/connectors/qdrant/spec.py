"""Qdrant as the registry lists it: a managed store."""

from __future__ import annotations

from embedd_dagster.connectors.spec import ConnectorSpec, ManagedStoreSpec, StoreCapabilities
from embedd_dagster.protocols.store import Store
from embedd_dagster.settings import Settings


def _open(settings: Settings, read_timeout_seconds: float | None) -> Store:
    from embedd_dagster.connectors.qdrant.store import QdrantStore

    key = settings.qdrant_api_key.get_secret_value() if settings.qdrant_api_key else None
    return QdrantStore(
        settings.qdrant_url, key, grpc_port=settings.qdrant_grpc_port, read_timeout_seconds=read_timeout_seconds
    )


def _url_of(settings: Settings, name: str) -> str:
    return f"{settings.qdrant_url.rstrip('/')}/collections/{name}"


SPEC = ConnectorSpec(
    "qdrant",
    "Qdrant",
    managed_store=ManagedStoreSpec(_open, StoreCapabilities(max_dimensions=65_536, max_name_length=255), _url_of),
)
