"""What every use of the engine stands on: settings, catalog, secrets, and how sources, stores and embedders are opened."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from embedd_dagster.catalog import connections, embedding_providers
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.connectors import embedders, sources, stores
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.embedder import Embedder
from embedd_dagster.protocols.source import Source
from embedd_dagster.protocols.store import PlatformStore, Store
from embedd_dagster.settings import Settings


@dataclass(frozen=True, slots=True)
class Runtime:
    """One process's access to everything. Safe to use from several threads; close it at the end."""

    settings: Settings
    catalog: Catalog
    box: SecretBox

    @classmethod
    def open(cls, settings: Settings) -> Runtime:
        """A runtime by these settings; nothing is connected to before it is used."""
        keys = [key.get_secret_value() for key in settings.encryption_keys]
        return cls(settings, Catalog(settings.database_url.get_secret_value()), SecretBox(keys))

    def open_source(self, connection: Connection) -> Source:
        """The source behind a connection; the caller closes it. Raises SecretUnreadable."""
        credentials = connections.open_credentials(connection, self.box)
        return sources.open_source(
            connection.provider,
            credentials,
            deny_private_networks=self.settings.deny_private_networks,
            allow_unix_sockets=self.settings.allow_unix_sockets,
            silence_seconds=self.settings.database_silence_seconds,
        )

    def open_store(self, mode: Mode, connection: Connection, *, read_timeout_seconds: float | None = None) -> Store:
        """Where vectors of this mode live; the caller closes it. Raises SecretUnreadable."""
        if mode is Mode.PLATFORM:
            return self.open_platform_store(connection)
        api_key = self.settings.qdrant_api_key
        return stores.open_qdrant(
            self.settings.qdrant_url,
            api_key.get_secret_value() if api_key else None,
            grpc_port=self.settings.qdrant_grpc_port,
            read_timeout_seconds=read_timeout_seconds,
        )

    def open_platform_store(self, connection: Connection) -> PlatformStore:
        """The store inside a connection's own database; the caller closes it. Raises SecretUnreadable."""
        credentials = connections.open_credentials(connection, self.box)
        return stores.open_platform_store(
            connection.provider,
            credentials,
            deny_private_networks=self.settings.deny_private_networks,
            allow_unix_sockets=self.settings.allow_unix_sockets,
            silence_seconds=self.settings.database_silence_seconds,
        )

    def open_embedder(
        self,
        provider: EmbeddingProvider | None,
        model: str,
        dimensions: int,
        *,
        timeout_seconds: float | None = None,
        one_text_at_a_time: bool = False,
    ) -> Embedder:
        """One model of a provider, unpaced; the caller closes it. Raises SecretUnreadable, ConfigurationError."""
        if provider is None:
            raise ConfigurationError(
                "This vector table has no embedding provider, and its source cannot embed by itself."
            )
        return embedders.open_embedder(
            provider.provider,
            credentials=embedding_providers.open_credentials(provider, self.box),
            model=model,
            dimensions=dimensions,
            limits=provider.limits,
            timeout_seconds=timeout_seconds,
            one_text_at_a_time=one_text_at_a_time,
            deny_private_networks=self.settings.deny_private_networks,
        )

    def close(self) -> None:
        """Gives the catalog's connections back."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
