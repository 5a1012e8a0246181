"""Gemini as the registry lists it: an embedder."""

from __future__ import annotations

from embedd_dagster.connectors.gemini.models import HOSTS, MODELS
from embedd_dagster.connectors.http.options import http_options
from embedd_dagster.connectors.spec import ConnectorSpec, EmbedderOptions, EmbedderSpec
from embedd_dagster.protocols.embedder import Embedder


def _open(options: EmbedderOptions) -> Embedder:
    from embedd_dagster.connectors.gemini.embedder import GeminiEmbedder

    return GeminiEmbedder(model=options.model, dimensions=options.dimensions, **http_options(options))


SPEC = ConnectorSpec("gemini", "Gemini", embedder=EmbedderSpec(_open, MODELS, HOSTS))
