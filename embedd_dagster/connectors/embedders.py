"""Embedding providers, one file each; `open_embedder` is the registry.

A provider's SDK is imported in its own branch, so that nothing is loaded for the providers that are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from embedd_dagster.core.models import ProviderKind
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.embedder import DEFAULT_TIMEOUT_SECONDS, Embedder

if TYPE_CHECKING:
    from embedd_dagster.connectors.gemini.embedder import GeminiEmbedder
    from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder
    from embedd_dagster.connectors.voyage.embedder import VoyageEmbedder

KNOWN_PROVIDERS = (ProviderKind.OPENAI, ProviderKind.GEMINI, ProviderKind.VOYAGE, ProviderKind.LOCAL)


def open_embedder(
    provider: ProviderKind | str,
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

    Of `limits`, `concurrency`, `max_input_tokens` and `request_timeout_seconds` matter here; `PacedEmbedder` keeps the
    others. `timeout_seconds` is the most that the caller can wait. A base_url that leads to a link-local, metadata or
    multicast address (or, with `deny_private_networks`, a private one) is refused when it is used. For questions,
    `one_text_at_a_time` keeps a provider's answer small, as many are awaited at once in one process. Raises
    ConfigurationError for a provider that is not known or not installed, EmbeddingRejected for credentials that cannot be
    right.
    """
    limits = limits or {}
    concurrency = limits.get("concurrency")
    if provider == ProviderKind.LOCAL:
        from embedd_dagster.connectors.local.embedder import LocalEmbedder

        return LocalEmbedder(model=model, dimensions=dimensions, concurrency=concurrency)
    if provider in KNOWN_PROVIDERS:
        from embedd_dagster.connectors.http.transport import ANSWER_TO_ONE_TEXT, LARGEST_ANSWER

        return _http_embedder(ProviderKind(provider))(
            api_key=credentials.get("api_key"),
            base_url=credentials.get("base_url"),
            model=model,
            dimensions=dimensions,
            concurrency=concurrency,
            timeout_seconds=_timeout_seconds(limits, timeout_seconds),
            max_input_tokens=limits.get("max_input_tokens"),
            deny_private_networks=deny_private_networks,
            largest_answer=ANSWER_TO_ONE_TEXT if one_text_at_a_time else LARGEST_ANSWER,
        )
    known = ", ".join(KNOWN_PROVIDERS)
    raise ConfigurationError(
        f"There is no embedding provider {str(provider)!r} in this version; known: {known}.",
        resolution=f"Use one of {known}; `openai` with a base_url reaches any OpenAI-compatible server.",
    )


def _timeout_seconds(limits: Mapping[str, int | None], most: float | None) -> float:
    configured = float(limits.get("request_timeout_seconds") or DEFAULT_TIMEOUT_SECONDS)
    return configured if most is None else min(configured, most)


def _http_embedder(
    provider: ProviderKind,
) -> type[OpenAIEmbedder] | type[GeminiEmbedder] | type[VoyageEmbedder]:
    if provider is ProviderKind.GEMINI:
        from embedd_dagster.connectors.gemini.embedder import GeminiEmbedder

        return GeminiEmbedder
    if provider is ProviderKind.VOYAGE:
        from embedd_dagster.connectors.voyage.embedder import VoyageEmbedder

        return VoyageEmbedder
    from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder

    return OpenAIEmbedder
