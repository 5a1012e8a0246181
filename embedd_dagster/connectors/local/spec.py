"""The local model as the registry lists it: an embedder."""

from __future__ import annotations

from embedd_dagster.connectors.spec import ConnectorSpec, EmbedderOptions, EmbedderSpec
from embedd_dagster.protocols.embedder import Embedder


def _open(options: EmbedderOptions) -> Embedder:
    from embedd_dagster.connectors.local.embedder import LocalEmbedder

    return LocalEmbedder(
        model=options.model, dimensions=options.dimensions, concurrency=options.limits.get("concurrency")
    )


SPEC = ConnectorSpec("local", "The local model", embedder=EmbedderSpec(_open), extra="local")
