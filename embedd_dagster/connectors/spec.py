"""What a connector declares about itself: what it can open, its limits, and the extra that installs it.

Importing a spec imports no SDK: factories import what they open when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from embedd_dagster.core.models import EmbeddingModel
from embedd_dagster.deadlines import DeadlineSource, no_deadline
from embedd_dagster.protocols.embedder import Embedder
from embedd_dagster.protocols.source import Source
from embedd_dagster.protocols.store import PlatformStore, Store
from embedd_dagster.settings import Settings


@dataclass(frozen=True, slots=True)
class DatabaseOptions:
    """How a user's database is reached."""

    statement_timeout_seconds: float = 3600
    """The longest that one statement may take. A digest is one statement over the whole table."""
    connect_timeout_seconds: int = 10
    """The longest that connecting to one address may take."""
    deny_private_networks: bool = False
    """Reject hosts in private networks. Link-local addresses and metadata services are always rejected."""
    allow_unix_sockets: bool = False
    """Accept the directory of a Unix socket as host, with a password."""
    silence_seconds: float = 60.0
    """After this long without a byte, the server is asked whether it still works."""
    current_deadline: DeadlineSource = no_deadline
    """Says until when the present operation may wait for the database."""


@dataclass(frozen=True, slots=True)
class EmbedderOptions:
    """One model at given dimensions, and how its provider is reached."""

    model: str
    dimensions: int
    credentials: Mapping[str, Any] = field(default_factory=dict)
    """Those of the embedding provider, or those of the source connection if the source embeds by itself."""
    limits: Mapping[str, int | None] = field(default_factory=dict)
    """Of these, embedders read `concurrency` and `max_input_tokens`; `PacedEmbedder` keeps the others."""
    timeout_seconds: float = 60.0
    deny_private_networks: bool = False
    one_text_at_a_time: bool = False
    """For questions: many are answered at once in one process, so a provider's answer is kept small."""


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """The limits of a vector store."""

    max_dimensions: int
    max_name_length: int
    """Of the name that a vector table is stored under, without what the store puts before it."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A connector's source."""

    open: Callable[[Mapping[str, Any], DatabaseOptions], Source]
    credentials: type[BaseModel]
    """What a user gives to connect. Fields of type `SecretStr` are encrypted and never shown."""
    leftover_resolution: Callable[[str], str] = lambda _name: ""
    """How an administrator removes by hand what the CDC stream of this name created; ends with a full stop."""
    embeds_itself: bool = False
    """Its vector tables may have no embedding provider."""


@dataclass(frozen=True, slots=True)
class PlatformStoreSpec:
    """A store inside a source database. `public_ref` makes the name that users query, from a schema and a stored name."""

    open: Callable[[Mapping[str, Any], str | None, DatabaseOptions], PlatformStore]
    public_ref: Callable[[str, str], str]
    capabilities: StoreCapabilities


@dataclass(frozen=True, slots=True)
class ManagedStoreSpec:
    """A vector store of the installation; `open` takes the settings and the longest that a search waits, in seconds."""

    open: Callable[[Settings, float | None], Store]
    capabilities: StoreCapabilities
    url_of: Callable[[Settings, str], str | None] = lambda _settings, _name: None
    """Where a person finds the vectors that are stored under this name; None if there is no such page."""


@dataclass(frozen=True, slots=True)
class EmbedderSpec:
    """A connector's embedder."""

    open: Callable[[EmbedderOptions], Embedder]
    models: tuple[EmbeddingModel, ...]
    """The known ones; the first is what a provider is tested with. A server behind a `base_url` may have others."""
    hosts: tuple[str, ...] = ()
    """Where the provider itself answers: a server elsewhere may have other models of the same names."""
    is_remote: bool = True
    """Whether it is a server: it takes credentials, and limits of its requests."""
    rows_per_second: float = 5_000.0
    """What an estimate of the duration expects."""


@dataclass(frozen=True, slots=True)
class ConnectorSpec:
    """One external system. `extra` is the optional dependency of this distribution that installs its SDK."""

    name: str
    title: str
    source: SourceSpec | None = None
    platform_store: PlatformStoreSpec | None = None
    managed_store: ManagedStoreSpec | None = None
    embedder: EmbedderSpec | None = None
    extra: str | None = None
