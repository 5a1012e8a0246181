"""The models of Gemini, and where Gemini itself answers."""

from __future__ import annotations

from typing import Final

from embedd_dagster.core.models import EmbeddingModel

MODELS: Final = (EmbeddingModel("gemini-embedding-001", 3072, 2048, 0.15, min_dimensions=128),)

HOSTS: Final = ("generativelanguage.googleapis.com",)
