"""Embedding providers, one file each; `open_embedder` is the registry.

A provider's SDK is imported in its own branch, so that nothing is loaded for the providers that are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedd_dagster.core.models import ProviderKind
from embedd_dagster.embedders.base import Embedder
from embedd_dagster.errors import ConfigurationError

KNOWN_PROVIDERS = (ProviderKind.OPENAI, ProviderKind.LOCAL)


def open_embedder(
    provider: ProviderKind | str,
    *,
    credentials: Mapping[str, Any],
    model: str,
    dimensions: int,
    limits: Mapping[str, int | None] | None = None,
    timeout_seconds: float = 60.0,
) -> Embedder:
    """One model of a provider at these dimensions, unpaced; the caller closes it. Nothing is connected to yet.

    Of `limits` only `concurrency` matters here; `PacedEmbedder` keeps the others. Raises ConfigurationError for a
    provider that is not known or not installed, EmbeddingRejected for credentials that cannot be right.
    """
    concurrency = (limits or {}).get("concurrency")
    if provider == ProviderKind.OPENAI:
        from embedd_dagster.embedders.openai import OpenAIEmbedder

        return OpenAIEmbedder(
            api_key=credentials.get("api_key"),
            base_url=credentials.get("base_url"),
            model=model,
            dimensions=dimensions,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
        )
    if provider == ProviderKind.LOCAL:
        from embedd_dagster.embedders.local import LocalEmbedder

        return LocalEmbedder(model=model, dimensions=dimensions, concurrency=concurrency)
    known = ", ".join(KNOWN_PROVIDERS)
    raise ConfigurationError(
        f"There is no embedding provider {str(provider)!r} in this version; known: {known}.",
        resolution=f"Use one of {known}; `openai` with a base_url reaches any OpenAI-compatible server.",
    )
