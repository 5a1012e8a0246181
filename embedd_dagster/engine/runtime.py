"""What every use of the engine stands on: settings, catalog, secrets, and how sources, stores and embedders are opened."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from embedd_dagster.catalog import connections, embedding_providers
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import Connection, EmbeddingProvider
from embedd_dagster.connectors import registry
from embedd_dagster.connectors.spec import StoreCapabilities
from embedd_dagster.core.vector_table import Mode
from embedd_dagster.deadlines import current_deadline
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
        return registry.open_source(connection.provider, credentials, **self._database_options())

    def open_store(self, mode: Mode, connection: Connection, *, read_timeout_seconds: float | None = None) -> Store:
        """Where vectors of this mode live; the caller closes it. Raises SecretUnreadable."""
        if mode is Mode.PLATFORM:
            return self.open_platform_store(connection, read_timeout_seconds=read_timeout_seconds)
        return self.open_managed_store(read_timeout_seconds=read_timeout_seconds)

    def open_managed_store(self, *, read_timeout_seconds: float | None = None) -> Store:
        """The installation's own store; the caller closes it."""
        return registry.open_managed_store(
            self.settings.managed_store, self.settings, read_timeout_seconds=read_timeout_seconds
        )

    def open_platform_store(
        self, connection: Connection, *, read_timeout_seconds: float | None = None
    ) -> PlatformStore:
        """The store inside a connection's own database; the caller closes it. Raises SecretUnreadable."""
        credentials = connections.open_credentials(connection, self.box)
        options = self._database_options()
        if read_timeout_seconds is not None:  # a driver may take whole seconds only, from 2 on
            options["connect_timeout_seconds"] = max(2, min(10, round(read_timeout_seconds)))
        return registry.open_platform_store(connection.provider, credentials, **options)

    def store_capabilities(self, mode: Mode, connection: Connection) -> StoreCapabilities:
        """The limits of the store that keeps this connection's vectors. Raises ConfigurationError."""
        if mode is Mode.PLATFORM:
            return registry.platform_store_spec(connection.provider).capabilities
        return registry.managed_store_spec(self.settings.managed_store).capabilities

    def open_embedder(
        self,
        provider: EmbeddingProvider | None,
        connection: Connection,
        model: str,
        dimensions: int,
        *,
        timeout_seconds: float | None = None,
        one_text_at_a_time: bool = False,
    ) -> Embedder:
        """One model of a provider, or of the source if it has none, unpaced; the caller closes it.

        Raises SecretUnreadable, ConfigurationError.
        """
        if provider is not None:
            name, credentials = provider.provider, embedding_providers.open_credentials(provider, self.box)
        elif registry.source_spec(connection.provider).embeds_itself:
            name, credentials = connection.provider, connections.open_credentials(connection, self.box)
        else:
            raise ConfigurationError(
                "This vector table has no embedding provider, and its source cannot embed by itself."
            )
        return registry.open_embedder(
            name,
            credentials=credentials,
            model=model,
            dimensions=dimensions,
            limits=provider.limits if provider else None,
            timeout_seconds=timeout_seconds,
            one_text_at_a_time=one_text_at_a_time,
            deny_private_networks=self.settings.deny_private_networks,
        )

    def _database_options(self) -> dict[str, Any]:
        return {
            "deny_private_networks": self.settings.deny_private_networks,
            "allow_unix_sockets": self.settings.allow_unix_sockets,
            "silence_seconds": self.settings.database_silence_seconds,
            "current_deadline": current_deadline,
        }

    def close(self) -> None:
        """Gives the catalog's connections back."""
        self.catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
