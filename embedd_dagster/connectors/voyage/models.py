"""The models of Voyage, and where Voyage itself answers."""

from __future__ import annotations

from typing import Final

from embedd_dagster.core.models import EmbeddingModel

_DIMENSIONS: Final = (256, 512, 2048)

MODELS: Final = (
    EmbeddingModel("voyage-4-large", 1024, 32_000, 0.12, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-4", 1024, 32_000, 0.06, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-4-lite", 1024, 32_000, 0.02, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-3-large", 1024, 32_000, 0.18, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-3.5", 1024, 32_000, 0.06, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-3.5-lite", 1024, 32_000, 0.02, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-code-3", 1024, 32_000, 0.18, other_dimensions=_DIMENSIONS),
    EmbeddingModel("voyage-finance-2", 1024, 32_000, 0.12),
    EmbeddingModel("voyage-law-2", 1024, 16_000, 0.12),
)

HOSTS: Final = ("api.voyageai.com",)
