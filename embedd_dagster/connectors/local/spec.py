"""The local model as the registry lists it: an embedder."""

from __future__ import annotations

from typing import Final

from embedd_dagster.connectors.local.models import MODELS
from embedd_dagster.connectors.spec import ConnectorSpec, EmbedderOptions, EmbedderSpec
from embedd_dagster.protocols.embedder import Embedder

_ROWS_PER_SECOND: Final = 130.0
"""Measured on two cores: docs/decisions/0003, docs/benchmarks.md."""


def _open(options: EmbedderOptions) -> Embedder:
    from embedd_dagster.connectors.local.embedder import LocalEmbedder

    return LocalEmbedder(
        model=options.model, dimensions=options.dimensions, concurrency=options.limits.get("concurrency")
    )


SPEC = ConnectorSpec(
    "local",
    "The local model",
    embedder=EmbedderSpec(_open, MODELS, is_remote=False, rows_per_second=_ROWS_PER_SECOND),
    extra="local",
)
