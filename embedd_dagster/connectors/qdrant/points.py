"""Points as Qdrant's upserts take them: a protobuf message with vectors as bytes, or JSON made by orjson from numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import orjson

from embedd_dagster.connectors.qdrant.filters import payload_key
from embedd_dagster.connectors.qdrant.messages import UpsertPoints, fill_payload, vector_bytes
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.keys import Key, decode_key, encode_key, point_id, point_ids
from embedd_dagster.core.rows import PointBatch, VectorSet

BODY_BYTES: Final = 16 * 2**20
"""Qdrant refuses bodies above 32 MB; where every character is a control character, a body has twice what was reckoned."""
_BYTES_PER_DIMENSION: Final = 13  # of a float32 in JSON, with its comma
_BYTES_PER_CHARACTER: Final = 3  # in JSON: mostly one, at most six
_BYTES_PER_COLUMN: Final = 28  # of metadata, besides its name: a number with its quotes, colon and comma
_INTEGERS: Final = range(-(2**63), 2**63)  # of a payload; others would become floats


def point_uuid(vector_set: VectorSet, key: Key) -> str:
    """The id of a key's point, as it goes over the wire."""
    return str(point_id(vector_set.vector_table_id, encode_key(key)))


def stored_key(key: Key, encoded: str) -> int | str:
    """The key as it is in the payload: an integer as such, anything else as type-tagged text."""
    return key if type(key) is int and key in _INTEGERS else encoded


def read_key(stored: int | str) -> Key:
    """The key that `stored_key` gave this for."""
    return stored if isinstance(stored, int) else decode_key(stored)


def split_batch(vector_set: VectorSet, points: PointBatch) -> Iterator[slice]:
    """The parts of a batch that make bodies of some 16 MB."""
    fixed = 500 + vector_set.dimensions * _BYTES_PER_DIMENSION
    fixed += sum(len(payload_key(name).encode()) + _BYTES_PER_COLUMN for name in vector_set.filter_types)
    start = size = 0
    for index, (text, metadata) in enumerate(zip(points.texts, points.metadata, strict=True)):
        length = len(text)
        for value in metadata.values():
            if type(value) is str:
                length += len(value)
        own = fixed + _BYTES_PER_CHARACTER * length
        if size and size + own > BODY_BYTES:
            yield slice(start, index)
            start, size = index, 0
        size += own
    if size:
        yield slice(start, len(points))


def upsert_body(vector_set: VectorSet, points: PointBatch, part: slice) -> bytes:
    """The JSON body that writes this part of a batch."""
    vectors = np.ascontiguousarray(points.vectors[part], dtype=np.float32)
    ids, payloads = _ids_and_payloads(vector_set, points, part)
    body = {"batch": {"ids": ids, "vectors": vectors, "payloads": payloads}}
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # a lone surrogate somewhere, which UTF-8 cannot hold
        return orjson.dumps(_clean(body), option=orjson.OPT_SERIALIZE_NUMPY)


def upsert_message(vector_set: VectorSet, points: PointBatch, part: slice) -> Any:
    """The message `UpsertPoints` that writes this part of a batch and waits until it is on disk."""
    ids, payloads = _ids_and_payloads(vector_set, points, part)
    message = UpsertPoints(collection_name=vector_set.versioned_name, wait=True)
    for uuid, payload, vector in zip(ids, payloads, points.vectors[part], strict=True):
        point = message.points.add()
        point.id.uuid = uuid
        point.vectors.vector.data = vector_bytes(vector)
        try:
            fill_payload(point.payload, payload)
        except UnicodeEncodeError:  # a lone surrogate somewhere, which UTF-8 cannot hold
            point.payload.clear()
            fill_payload(point.payload, _clean(payload))
    return message


def _ids_and_payloads(vector_set: VectorSet, points: PointBatch, part: slice) -> tuple[list[str], list[dict[str, Any]]]:
    """`None` in metadata is left out."""
    keys = [encode_key(key) for key in points.keys[part]]
    names = {name: payload_key(name) for name in set().union(*points.metadata[part])}
    payloads = [
        {
            "pk": stored_key(key, encoded),
            "embedded_text": text,
            "row_hash": row_hash,
            "bucket": bucket,
            "metadata": {names[name]: value for name, value in metadata.items() if value is not None},
        }
        for key, encoded, text, row_hash, bucket, metadata in zip(
            points.keys[part],
            keys,
            points.texts[part],
            points.row_hashes[part],
            points.buckets[part],
            points.metadata[part],
            strict=True,
        )
    ]
    ordinals = None if points.ordinals is None else points.ordinals[part]
    return point_ids(vector_set.vector_table_id, keys, ordinals), payloads


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
