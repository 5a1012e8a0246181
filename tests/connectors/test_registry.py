"""The registry of connectors: lookups, registration at run time, and packages that are not installed."""

from __future__ import annotations

import pytest

from embedd_dagster.connectors import registry
from embedd_dagster.connectors.spec import ConnectorSpec, EmbedderOptions, EmbedderSpec
from embedd_dagster.errors import ConfigurationError
from embedd_dagster.protocols.embedder import Embedder
from tests.support.memory_embedder import MemoryEmbedder


def _open(options: EmbedderOptions) -> Embedder:
    return MemoryEmbedder(options.dimensions)


def _open_without_sdk(options: EmbedderOptions) -> Embedder:
    raise ModuleNotFoundError("No module named 'toy_sdk'", name="toy_sdk")


def test_an_unknown_embedder_is_an_error_and_opens_no_other_one() -> None:
    with pytest.raises(ConfigurationError, match="cohere"):
        registry.open_embedder("cohere", credentials={"api_key": "secret"}, model="m", dimensions=4)


def test_a_connector_is_listed_only_while_it_is_registered() -> None:
    with registry.registered(ConnectorSpec("toy", "Toy", embedder=EmbedderSpec(_open, models=()))):
        assert "toy" in registry.embedders()
        assert "toy" not in registry.sources()
        assert registry.open_embedder("toy", credentials={}, model="m", dimensions=4).embed_query("a").shape == (4,)
    assert "toy" not in registry.embedders()


def test_a_name_that_is_taken_is_rejected() -> None:
    with pytest.raises(ConfigurationError), registry.registered(ConnectorSpec("qdrant", "Another")):
        pass
    assert "qdrant" in registry.managed_stores()


def test_a_package_that_is_not_installed_is_named_with_the_pip_command() -> None:
    spec = ConnectorSpec("toy", "Toy", embedder=EmbedderSpec(_open_without_sdk, models=()), extra="toy")
    with registry.registered(spec), pytest.raises(ConfigurationError, match="toy_sdk") as caught:
        registry.open_embedder("toy", credentials={}, model="m", dimensions=4)
    assert "pip install 'embedd-vector-tables[toy]'" in caught.value.resolution
