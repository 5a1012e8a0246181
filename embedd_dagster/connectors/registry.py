"""The list of connectors, and how a source, a store and an embedder are opened by their connector's name.

An unknown name is a ConfigurationError that lists the known ones. A connector whose package is not installed is one that
gives the pip command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from embedd_dagster.connectors.gemini.spec import SPEC as GEMINI
from embedd_dagster.connectors.local.spec import SPEC as LOCAL
from embedd_dagster.connectors.openai.spec import SPEC as OPENAI
from embedd_dagster.connectors.postgresql.spec import SPEC as POSTGRESQL
from embedd_dagster.connectors.qdrant.spec import SPEC as QDRANT
from embedd_dagster.connectors.spec import (
    ConnectorSpec,
    DatabaseOptions,
    EmbedderOptions,
    EmbedderSpec,
    ManagedStoreSpec,
    PlatformStoreSpec,
    SourceSpec,
)
from embedd_dagster.connectors.voyage.spec import SPEC as VOYAGE
from embedd_dagster.core.models import EmbeddingModel, find_model
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.embedder import DEFAULT_TIMEOUT_SECONDS, Embedder
from embedd_dagster.protocols.source import Source
from embedd_dagster.protocols.store import PlatformStore, Store
from embedd_dagster.settings import Settings

P = TypeVar("P", ConnectorSpec, SourceSpec, PlatformStoreSpec, ManagedStoreSpec, EmbedderSpec)
T = TypeVar("T")

_DISTRIBUTION: Final = "embedd-vector-tables"
_connectors: Final[dict[str, ConnectorSpec]] = {
    spec.name: spec for spec in (POSTGRESQL, QDRANT, OPENAI, GEMINI, VOYAGE, LOCAL)
}

MAX_DIMENSIONS: Final = max(
    part.capabilities.max_dimensions
    for spec in _connectors.values()
    for part in (spec.platform_store, spec.managed_store)
    if part is not None
)
"""What the store with the highest limit takes; validation goes by the store in question."""


@contextmanager
def registered(spec: ConnectorSpec) -> Iterator[None]:
    """Lists one more connector during the block. Raises ConfigurationError if its name is taken."""
    if spec.name in _connectors:
        raise ConfigurationError(f"A connector named {spec.name!r} is registered already.")
    _connectors[spec.name] = spec
    try:
        yield
    finally:
        del _connectors[spec.name]


def connector(name: str) -> ConnectorSpec:
    """The whole connector. Raises ConfigurationError."""
    return _part(name, lambda spec: spec, "connector", tuple(_connectors))


def sources() -> tuple[str, ...]:
    """The connectors that have a source."""
    return tuple(spec.name for spec in _connectors.values() if spec.source)


def platform_stores() -> tuple[str, ...]:
    """The connectors whose database can hold vectors."""
    return tuple(spec.name for spec in _connectors.values() if spec.platform_store)


def managed_stores() -> tuple[str, ...]:
    """The connectors that can hold the vectors of managed mode."""
    return tuple(spec.name for spec in _connectors.values() if spec.managed_store)


def embedders() -> tuple[str, ...]:
    """The connectors that have an embedder."""
    return tuple(spec.name for spec in _connectors.values() if spec.embedder)


def source_spec(name: str) -> SourceSpec:
    """The connector's source. Raises ConfigurationError."""
    return _part(name, lambda spec: spec.source, "source", sources())


def leftover_resolution(provider: str, name: str) -> str:
    """What to run in a database of this provider to remove the CDC stream of this name. Raises ConfigurationError."""
    return source_spec(provider).leftover_resolution(name)


def platform_store_spec(name: str) -> PlatformStoreSpec:
    """The connector's platform store. Raises ConfigurationError."""
    return _part(name, lambda spec: spec.platform_store, "platform store", platform_stores())


def managed_store_spec(name: str) -> ManagedStoreSpec:
    """The connector's managed store. Raises ConfigurationError."""
    return _part(name, lambda spec: spec.managed_store, "managed store", managed_stores())


def embedder_spec(name: str) -> EmbedderSpec:
    """The connector's embedder. Raises ConfigurationError."""
    return _part(name, lambda spec: spec.embedder, "embedder", embedders())


def embedding_models() -> list[tuple[str, EmbeddingModel]]:
    """The known models, each with its connector's name."""
    return [(name, model) for name in embedders() for model in embedder_spec(name).models]


def find_model_by_name(name: str) -> EmbeddingModel | None:
    """The first known model of this name, of any connector, or None."""
    return find_model((model for _, model in embedding_models()), name)


def open_source(provider: str, credentials: Mapping[str, Any], **options: Any) -> Source:
    """The source of this provider, which connects when it is first used; the caller closes it.

    `options` are those of `DatabaseOptions`. Raises ConfigurationError for an unknown provider, and for a credential that
    is missing or malformed.
    """
    spec = source_spec(provider)
    return _opened(provider, lambda: spec.open(credentials, DatabaseOptions(**options)))


def open_platform_store(
    provider: str, credentials: Mapping[str, Any], schema: str | None = None, **options: Any
) -> PlatformStore:
    """The store inside a source database, which connects when it is first used; the caller closes it.

    New vector tables go to `schema`; without one, to the first schema of the search path that may be written. `options` are
    those of `DatabaseOptions`. Raises ConfigurationError as `open_source`.
    """
    spec = platform_store_spec(provider)
    return _opened(provider, lambda: spec.open(credentials, schema, DatabaseOptions(**options)))


def open_managed_store(name: str, settings: Settings, *, read_timeout_seconds: float | None = None) -> Store:
    """The installation's own store, which connects when it is first used; the caller closes it.

    A search waits `read_timeout_seconds`, or the connector's default. Raises ConfigurationError for an unknown name and for
    settings that cannot be right.
    """
    spec = managed_store_spec(name)
    return _opened(name, lambda: spec.open(settings, read_timeout_seconds))


def open_embedder(
    provider: str,
    *,
    credentials: Mapping[str, Any],
    model: str,
    dimensions: int,
    limits: Mapping[str, int | None] | None = None,
    timeout_seconds: float | None = None,
    deny_private_networks: bool = False,
    one_text_at_a_time: bool = False,
) -> Embedder:
    """One model of a provider at these dimensions, unpaced; the caller closes it. Nothing is connected to yet.

    `timeout_seconds` is the longest that the caller can wait for one answer. Raises ConfigurationError for a provider that is
    unknown or not installed, EmbeddingRejected for credentials that cannot be right.
    """
    spec, limits = embedder_spec(provider), limits or {}
    configured = float(limits.get("request_timeout_seconds") or DEFAULT_TIMEOUT_SECONDS)
    options = EmbedderOptions(
        model=model,
        dimensions=dimensions,
        credentials=credentials,
        limits=limits,
        timeout_seconds=configured if timeout_seconds is None else min(configured, timeout_seconds),
        deny_private_networks=deny_private_networks,
        one_text_at_a_time=one_text_at_a_time,
    )
    return _opened(provider, lambda: spec.open(options))


def _part(name: str, part: Callable[[ConnectorSpec], P | None], noun: str, known: tuple[str, ...]) -> P:
    spec = _connectors.get(name)
    found = part(spec) if spec is not None else None
    if found is None:
        raise ConfigurationError(
            f"{str(name)!r} has no {noun} in this version; known: {', '.join(known)}.",
            resolution=f"Use one of {', '.join(known)}.",
        )
    return found


def _opened(name: str, opener: Callable[[], T]) -> T:
    """What the opener gives. Raises ConfigurationError with the pip command if the connector's package is not installed."""
    try:
        return opener()
    except ModuleNotFoundError as error:
        spec = _connectors[name]
        if spec.extra is None or (error.name or "").startswith("embedd_dagster"):
            raise
        raise ConfigurationError(
            f"{spec.title} needs the package {error.name!r}, which is not installed.",
            resolution=f"Run: pip install '{_DISTRIBUTION}[{spec.extra}]'",
        ) from None
