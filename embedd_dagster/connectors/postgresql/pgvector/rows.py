"""Points as PostgreSQL's binary COPY, and the primary key's type: what goes over the wire and comes back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, cast

import numpy as np
import orjson
from psycopg import Connection, sql
from psycopg.types.datetime import DateBinaryDumper, DatetimeBinaryDumper, DatetimeNoTzBinaryDumper
from psycopg.types.numeric import DecimalBinaryDumper

from embedd_dagster.connectors.postgresql.sessions import role_schemas
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.keys import Key, encode_key
from embedd_dagster.core.rows import PointBatch, Vectors
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import VectorStoreRejected

COPIED_COLUMNS: Final = "embedding, row_hash, text_hash, bucket, pk_value, embedded_text, metadata"
"""Those of one size first: NumPy makes that part of every row of a batch at once."""

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER: Final = struct.pack(">h", -1)
_LENGTH: Final = struct.Struct(">i")
_JSON: Final = struct.Struct(">ib")  # length, version 1

Dump = Callable[[Any], bytes]


def _encode_text(value: Any) -> bytes:
    return str(value).encode()


_DUMPERS: Final[dict[str, Dump]] = {
    "smallint": struct.Struct(">h").pack,
    "integer": struct.Struct(">i").pack,
    "bigint": struct.Struct(">q").pack,
    "uuid": lambda value: cast("bytes", value.bytes),
    "numeric": lambda value: cast("bytes", DecimalBinaryDumper(Decimal).dump(value)),
    "date": lambda value: cast("bytes", DateBinaryDumper(date).dump(value)),
    "timestamp without time zone": lambda value: cast("bytes", DatetimeNoTzBinaryDumper(datetime).dump(value)),
    "timestamp with time zone": lambda value: cast("bytes", DatetimeBinaryDumper(datetime).dump(value)),
}
_NOT_OF_THE_TYPE: Final = (struct.error, AttributeError, TypeError, ValueError, ArithmeticError)
_TEXTS: Final = frozenset({"text", "character varying", "bpchar", "name"})


@dataclass(frozen=True, slots=True)
class KeyType:
    """The type of `pk_value`: its SQL as the server itself writes it, and how keys of it travel."""

    sql_name: str
    base_name: str
    """Of a domain its base type, otherwise the same: what arrays are made of and what values are read as."""
    is_read_as_text: bool
    dump: Dump
    equals: str = "OPERATOR(pg_catalog.=)"
    """The equality that the primary key's index is made for."""

    @property
    def key_expression(self) -> str:
        """`pk_value` as it is read. `concat` is not a cast: for a cast to text, the type's owner could give a function."""
        return "pg_catalog.concat(pk_value)" if self.is_read_as_text else "pk_value"

    @property
    def is_among(self) -> str:
        """The condition of the rows whose key is in the one parameter, which `parameter` makes of keys."""
        return f"pk_value {self.equals} ANY (%s::{self.base_name.replace('%', '%%')}[])"

    def parameter(self, keys: Sequence[Key]) -> Any:
        """These keys as the parameter of `is_among`."""
        if not self.is_read_as_text:
            return list(keys)
        # as an array's text: an array of text would be cast element by element, by what may be a function of the type's owner
        escaped = (str(key).replace("\\", "\\\\").replace('"', '\\"') for key in keys)
        return "{" + ",".join(f'"{key}"' for key in escaped) + "}"

    def can_hold(self, key: Key) -> bool:
        """Whether it could be the key of a row; one of before the source's column took another type may not."""
        try:
            self.dump(key)
        except _NOT_OF_THE_TYPE:
            return False
        return isinstance(key, str) == (self.dump is _encode_text)


_KEY_TYPE: Final = """
WITH RECURSIVE chain AS (
    SELECT oid, typtype, typbasetype, typcategory, typnamespace, 0 AS depth
    FROM pg_catalog.pg_type WHERE oid = %(oid)s::pg_catalog.oid
    UNION ALL
    SELECT t.oid, t.typtype, t.typbasetype, t.typcategory, t.typnamespace, depth + 1
    FROM chain JOIN pg_catalog.pg_type t ON t.oid = chain.typbasetype WHERE chain.typtype = 'd'
)
SELECT pg_catalog.format_type(%(oid)s::pg_catalog.oid, -1), pg_catalog.format_type(chain.oid, -1),
       typtype::pg_catalog.text, typcategory::pg_catalog.text, n.nspname
FROM chain JOIN pg_catalog.pg_namespace n ON n.oid = chain.typnamespace ORDER BY depth DESC LIMIT 1
"""


def _type_oid(connection: Connection[Any], name: str) -> int | None:
    """The type of this name; one without a schema, as older versions kept it, is looked for in the role's search path."""
    schemas = ["", *role_schemas(connection)]
    for schema in schemas:
        qualified = f"{sql.Identifier(schema).as_string(None)}.{name}" if schema else name
        row = connection.execute("SELECT pg_catalog.to_regtype(%s)::pg_catalog.oid", [qualified]).fetchone()
        if row is not None and row[0] is not None:
            return int(row[0])
        if "." in name:
            break
    return None


def resolve_key_type(connection: Connection[Any], name: str | None) -> KeyType:
    """The type of this name, as the server knows it. Raises VectorStoreRejected for one that no key may have."""
    row = connection.execute(_KEY_TYPE, {"oid": _type_oid(connection, name or "")}).fetchone()
    if row is not None:
        sql_name, base_name, kind, category, schema = row
        if base_name in _DUMPERS:
            return KeyType(sql_name, base_name, is_read_as_text=False, dump=_DUMPERS[base_name])
        if base_name in _TEXTS:
            return KeyType(sql_name, base_name, is_read_as_text=False, dump=_encode_text)
        if kind == "e":
            return KeyType(sql_name, base_name, is_read_as_text=True, dump=_encode_text)
        if category == "S":  # citext and the like: their wire form is text, their operators are in their own schema
            equals = sql.SQL("OPERATOR({}.=)").format(sql.Identifier(schema)).as_string(None).replace("%", "%%")
            return KeyType(sql_name, base_name, is_read_as_text=True, dump=_encode_text, equals=equals)
    raise VectorStoreRejected(
        f"The database cannot store primary keys of type {name or '(unknown)'} next to vectors.",
        resolution="Use a primary key of type integer, text, uuid, numeric, date or timestamp.",
    )


def load_key(value: Any) -> Key:
    """A key as read by psycopg, timestamps with a zone in UTC."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    return cast("Key", value)


def load_metadata(metadata: dict[str, Any], filter_types: Mapping[str, FilterType]) -> dict[str, Any]:
    """Metadata as read from jsonb, which gives a large double back as an integer."""
    for name, value in metadata.items():
        if type(value) is int and filter_types.get(name) is FilterType.FLOAT:
            metadata[name] = float(value)
    return metadata


def copy_body(points: PointBatch, key_type: KeyType) -> bytes:
    """The points in the binary COPY format, in the order of `COPIED_COLUMNS`; of equal keys the last one.

    Raises VectorStoreRejected for a key that is not of the type.
    """
    try:
        keys = [key_type.dump(key) for key in points.keys]
    except _NOT_OF_THE_TYPE:
        raise VectorStoreRejected(
            f"A primary key is no {key_type.sql_name}, as the vectors are kept by.",
            resolution="If its column has taken another type, start a backfill: it keeps them by that.",
        ) from None
    heads, texts, documents = _row_heads(points), _text_bytes(points.texts), _json_bytes(points.metadata)
    parts = [_HEADER]
    for index in _last_of_each(points.keys):
        key, text, metadata = keys[index], texts[index], documents[index]
        parts += (
            heads[index],
            _LENGTH.pack(len(key)), key,
            _LENGTH.pack(len(text)), text,
            _JSON.pack(len(metadata) + 1, 1), metadata,
        )  # fmt: skip
    parts.append(_TRAILER)
    return b"".join(parts)


def _row_heads(points: PointBatch) -> list[bytes]:
    """The number of fields and those of one size, of every row."""
    dimensions = points.vectors.shape[1]
    layout = np.dtype(
        [
            ("fields", ">i2"),
            ("vector_size", ">i4"), ("dimensions", ">u2"), ("unused", ">u2"), ("vector", ">f4", (dimensions,)),
            ("row_hash_size", ">i4"), ("row_hash", ">i8"),
            ("text_hash_size", ">i4"), ("text_hash", ">i8"),
            ("bucket_size", ">i4"), ("bucket", ">i4"),
        ]
    )  # fmt: skip
    heads = np.empty(len(points), dtype=layout)
    heads["fields"] = 7
    heads["vector_size"], heads["dimensions"], heads["unused"] = 4 + 4 * dimensions, dimensions, 0
    heads["vector"] = points.vectors
    heads["row_hash_size"], heads["row_hash"] = 8, points.row_hashes
    heads["text_hash_size"], heads["text_hash"] = 8, points.text_hashes
    heads["bucket_size"], heads["bucket"] = 4, points.buckets
    rows: list[bytes] = heads.view(f"V{layout.itemsize}").tolist()
    return rows


def load_vector(raw: bytes) -> Vectors:
    """A vector in pgvector's binary form."""
    return np.frombuffer(raw, dtype=">f4", offset=4).astype(np.float32)


def vector_literal(vector: Vectors) -> str:
    """A vector in pgvector's text form."""
    # each number as short as distinguishes it from other float32: half the bytes that Python's repr of it would take
    return orjson.dumps(np.ascontiguousarray(vector, dtype=np.float32), option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _last_of_each(keys: list[Key]) -> Any:
    if len(set(keys)) == len(keys):
        return range(len(keys))
    return sorted({encode_key(key): index for index, key in enumerate(keys)}.values())


# Both look for what is rare in all of a batch at once: row by row that took half of the time of a COPY's body.


def _text_bytes(texts: list[str]) -> list[bytes]:
    try:
        raw = [text.encode() for text in texts]
    except UnicodeEncodeError:
        raw = [clean_text(text).encode() for text in texts]
    return [item.replace(b"\0", b"") for item in raw] if b"\0" in b"".join(raw) else raw


def _json_bytes(metadata: list[dict[str, Any]]) -> list[bytes]:
    try:
        raw = [orjson.dumps(item) for item in metadata]
        raw_text = b"".join(raw)
    except TypeError:  # a lone surrogate
        raw_text = b"null"
    if b"null" in raw_text or b"\\u0000" in raw_text:  # it seems: jsonb holds no NUL, and nulls are left out
        return [orjson.dumps(_clean(item)) for item in metadata]
    return raw


def _clean(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: clean_text(value) if isinstance(value, str) else value
        for name, value in metadata.items()
        if value is not None
    }
