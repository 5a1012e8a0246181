"""The toy connector as the registry lists it, once a test has registered it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, SecretStr

from embedd_dagster.connectors.spec import (
    ConnectorSpec,
    DatabaseOptions,
    EmbedderOptions,
    EmbedderSpec,
    ManagedStoreSpec,
    PlatformStoreSpec,
    SourceSpec,
    StoreCapabilities,
)
from embedd_dagster.connectors.strict_model import StrictModel
from embedd_dagster.core.models import EmbeddingModel
from embedd_dagster.settings import Settings
from tests.support.memory_embedder import MemoryEmbedder
from tests.support.toy_connector.database import open_database
from tests.support.toy_connector.source import ToySource
from tests.support.toy_connector.store import SetsInMemory, ToyStore

MODEL: Final = "toy-words"
MANAGED_SETS: Final = SetsInMemory()
"""What the managed store keeps."""
_CAPABILITIES: Final = StoreCapabilities(max_dimensions=4096, max_name_length=100)


class ToyCredentials(StrictModel):
    """How to reach a database in memory."""

    database: str = Field(min_length=1, max_length=100)
    token: SecretStr = Field(min_length=1, max_length=100)


def _open_source(credentials: Mapping[str, Any], _options: DatabaseOptions) -> ToySource:
    return ToySource(credentials["database"], credentials["token"])


def _open_platform_store(credentials: Mapping[str, Any], _schema: str | None, _options: DatabaseOptions) -> ToyStore:
    return ToyStore(open_database(credentials["database"], credentials["token"]).sets)


def _open_managed_store(_settings: Settings, _read_timeout_seconds: float | None) -> ToyStore:
    return ToyStore(MANAGED_SETS)


def _open_embedder(options: EmbedderOptions) -> MemoryEmbedder:
    return MemoryEmbedder(options.dimensions)


SPEC: Final = ConnectorSpec(
    "toy",
    "Toy",
    source=SourceSpec(_open_source, ToyCredentials, embeds_itself=True),
    platform_store=PlatformStoreSpec(_open_platform_store, lambda schema, name: f"{schema}/{name}", _CAPABILITIES),
    managed_store=ManagedStoreSpec(_open_managed_store, _CAPABILITIES),
    embedder=EmbedderSpec(_open_embedder, (EmbeddingModel(MODEL, 16, 8192, 0.0, min_dimensions=1),), is_remote=False),
)
