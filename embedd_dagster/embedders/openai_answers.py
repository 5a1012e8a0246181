"""The answer of OpenAI's embeddings protocol, which Voyage gives too."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import orjson
import pybase64

from embedd_dagster.core.rows import Vectors

# what `parse_answer` raises for something else
NOT_AN_ANSWER = (ValueError, TypeError, KeyError, IndexError, AttributeError)


class Answer(NamedTuple):
    """The vectors in the order of the texts, and the tokens where they were counted."""

    vectors: Vectors
    tokens: int | None


def parse_answer(content: bytes, text_count: int) -> Answer:
    """The answer for so many texts, floats or base64. Raises one of `NOT_AN_ANSWER` for what is none."""
    document = orjson.loads(content)
    items = document["data"]
    if len(items) != text_count:
        raise ValueError("not one vector a text")
    by_index = _in_order(items)
    is_base64 = isinstance(by_index[0], str)
    # in a list, null (some servers' NaN) becomes NaN
    vectors = _decode_base64(by_index) if is_base64 else np.asarray(by_index, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError("not one vector a text")
    usage = document.get("usage") or {}
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return Answer(vectors, int(tokens) if tokens is not None else None)


def _in_order(items: list[dict[str, Any]]) -> list[Any]:
    """The embeddings in the order of their texts; by position if no item says its index."""
    indices = [item.get("index") for item in items]
    if all(index is None for index in indices):
        indices = list(range(len(items)))
    by_index: list[Any] = [None] * len(items)
    for index, item in zip(indices, items, strict=True):
        if type(index) is not int or index < 0:
            raise ValueError("not an index")
        by_index[index] = item["embedding"]
    if any(embedding is None for embedding in by_index):
        raise ValueError("an index is missing")
    return by_index


def _decode_base64(embeddings: list[str]) -> Vectors:
    # a tenth of the time of the standard library's, which was 2.3 µs a vector of 384
    parts = [pybase64.b64decode(embedding, validate=True) for embedding in embeddings]
    size = len(parts[0])
    if size % 4 or any(len(part) != size for part in parts):
        raise ValueError("vectors of unlike sizes")
    # a bytearray, because an array over bytes could not be written to
    return np.frombuffer(bytearray().join(parts), dtype="<f4").reshape(len(parts), size // 4)
