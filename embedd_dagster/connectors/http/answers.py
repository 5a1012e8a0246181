"""Answers of OpenAI's embeddings protocol, which Voyage uses too, and vectors in JSON in general."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import orjson
import pybase64

from embedd_dagster.core.rows import Vectors

# what `parse_answer` raises for anything else
NOT_AN_ANSWER = (ValueError, TypeError, KeyError, IndexError, AttributeError)


class Answer(NamedTuple):
    """The vectors in the order of the texts, and the tokens if the provider counted them.

    An item whose vector cannot be read, or has another length than most, becomes a vector of NaN; the others are kept.
    """

    vectors: Vectors
    tokens: int | None


def parse_answer(content: bytes, text_count: int) -> Answer:
    """The answer for this many texts, floats or base64. Raises one of `NOT_AN_ANSWER`."""
    document = load_json(content)
    items = document["data"]
    if len(items) != text_count:
        raise ValueError("not one vector per text")
    vectors = read_vectors(_in_order(items))
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


def load_json(content: bytes) -> Any:
    """The document, which may contain `NaN` or `Infinity` as Python's json writes them. Raises ValueError."""
    try:
        return orjson.loads(content)
    except ValueError:
        if b"NaN" not in content and b"Infinity" not in content:
            raise
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_vectors(embeddings: list[Any]) -> Vectors:
    """The vectors, float lists or base64. Raises one of `NOT_AN_ANSWER` if none of them can be read."""
    with np.errstate(over="ignore"):  # beyond float32: Infinity
        return _read_all(embeddings)


def _read_all(embeddings: list[Any]) -> Vectors:
    try:
        # in a list, null (some servers' NaN) becomes NaN
        is_base64 = isinstance(embeddings[0], str)
        vectors = _decode_base64(embeddings) if is_base64 else np.asarray(embeddings, dtype=np.float32)
        if vectors.ndim == 2 and vectors.shape[1]:
            return vectors
    except NOT_AN_ANSWER:
        pass  # at least one of them cannot be read
    return _read_one_by_one(embeddings)


def _read_one_by_one(embeddings: list[Any]) -> Vectors:
    rows = [_read_vector(embedding) for embedding in embeddings]
    lengths = Counter(len(row) for row in rows if row is not None)
    if not lengths:
        raise ValueError("no vector can be read")
    dimensions = lengths.most_common(1)[0][0]
    vectors = np.full((len(rows), dimensions), np.nan, dtype=np.float32)
    for position, row in enumerate(rows):
        if row is not None and len(row) == dimensions:
            vectors[position] = row
    return vectors


def _read_vector(embedding: Any) -> Vectors | None:
    try:
        vector = _decode_base64([embedding])[0] if isinstance(embedding, str) else np.asarray(embedding, np.float32)
    except NOT_AN_ANSWER:
        return None
    return vector if vector.ndim == 1 and len(vector) else None


def _decode_base64(embeddings: list[str]) -> Vectors:
    # a tenth of the standard library's time, which was 2.3 µs per vector of 384
    parts = [pybase64.b64decode(embedding, validate=True) for embedding in embeddings]
    size = len(parts[0])
    if size % 4 or any(len(part) != size for part in parts):
        raise ValueError("vectors of different sizes")
    # a bytearray, because an array over bytes is read-only
    return np.frombuffer(bytearray().join(parts), dtype="<f4").reshape(len(parts), size // 4)
