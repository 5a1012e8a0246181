"""The models of OpenAI, and where OpenAI itself answers."""

from __future__ import annotations

from typing import Final

from embedd_dagster.core.models import EmbeddingModel

MODELS: Final = (
    EmbeddingModel("text-embedding-3-small", 1536, 8192, 0.02, min_dimensions=1),
    EmbeddingModel("text-embedding-3-large", 3072, 8192, 0.13, min_dimensions=1),
    EmbeddingModel("text-embedding-ada-002", 1536, 8192, 0.10),
)

HOSTS: Final = ("api.openai.com", "eu.api.openai.com", "us.api.openai.com")
