"""OpenAI as the registry lists it: an embedder."""

from __future__ import annotations

from embedd_dagster.connectors.http.options import http_options
from embedd_dagster.connectors.openai.models import HOSTS, MODELS
from embedd_dagster.connectors.spec import ConnectorSpec, EmbedderOptions, EmbedderSpec
from embedd_dagster.protocols.embedder import Embedder


def _open(options: EmbedderOptions) -> Embedder:
    from embedd_dagster.connectors.openai.embedder import OpenAIEmbedder

    return OpenAIEmbedder(model=options.model, dimensions=options.dimensions, **http_options(options))


SPEC = ConnectorSpec("openai", "OpenAI", embedder=EmbedderSpec(_open, MODELS, HOSTS))
