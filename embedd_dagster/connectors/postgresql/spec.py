"""PostgreSQL as the registry lists it: a source, and a platform store by pgvector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from embedd_dagster.connectors.postgresql.cdc.cleanup_advice import leftover_resolution
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.connectors.postgresql.pgvector.names import platform_vector_ref
from embedd_dagster.connectors.spec import (
    ConnectorSpec,
    DatabaseOptions,
    PlatformStoreSpec,
    SourceSpec,
    StoreCapabilities,
)
from embedd_dagster.protocols.source import Source
from embedd_dagster.protocols.store import PlatformStore


def _open_source(credentials: Mapping[str, Any], options: DatabaseOptions) -> Source:
    from embedd_dagster.connectors.postgresql.source import PostgresSource

    return PostgresSource(credentials, **asdict(options))


def _open_platform_store(credentials: Mapping[str, Any], schema: str | None, options: DatabaseOptions) -> PlatformStore:
    from embedd_dagster.connectors.postgresql.pgvector.store import PgvectorStore

    return PgvectorStore(
        credentials,
        schema,
        deny_private_networks=options.deny_private_networks,
        allow_unix_sockets=options.allow_unix_sockets,
        silence_seconds=options.silence_seconds,
        connect_timeout_seconds=options.connect_timeout_seconds,
        current_deadline=options.current_deadline,
    )


SPEC = ConnectorSpec(
    "postgresql",
    "PostgreSQL",
    source=SourceSpec(_open_source, PostgresqlCredentials, leftover_resolution),
    platform_store=PlatformStoreSpec(
        _open_platform_store,
        platform_vector_ref,
        # identifiers are cut at 63 bytes, and the view's name begins with `embedd_`
        StoreCapabilities(max_dimensions=16_000, max_name_length=63 - len("embedd_")),
    ),
)
