"""What is known of an embedding model: dimensions, token limit and list price.

Prices are US dollars per million input tokens as published by the providers in 2026; they only feed estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedd_dagster.errors import ValidationFailed


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """One model: `dimensions` it gives by default, and those it can be asked for."""

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


def find_model(models: Iterable[EmbeddingModel], name: str) -> EmbeddingModel | None:
    """The first model of this name, or None."""
    return next((model for model in models if model.name == name), None)


def check_model(
    provider: str,
    models: Sequence[EmbeddingModel],
    name: str,
    dimensions: int,
    *,
    own_server: bool = False,
    own_models: bool = False,
) -> None:
    """Raises ValidationFailed unless the provider, which has these models, gives this one with these dimensions.

    With `own_server` (a `base_url`) a model that is not listed is accepted. With `own_models`
    (a server that is not the provider's) so is any: a model of a known name may be another one there.
    """
    if own_models:
        return
    model = find_model(models, name)
    if model is None:
        if own_server:
            return
        known = ", ".join(model.name for model in models)
        raise ValidationFailed(f"embedding_model: {name!r} is not a model of provider {provider}; known: {known}.")
    if not model.gives(dimensions):
        raise ValidationFailed(
            f"embedding_dimensions: {name} gives {model.accepted_dimensions} dimensions, not {dimensions}."
        )
