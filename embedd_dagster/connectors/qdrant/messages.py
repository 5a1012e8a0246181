"""Qdrant's protobuf messages, in which the numbers of a vector are bytes.

Protobuf writes a packed list of floats as it writes bytes: a length, then four bytes per number, the lowest first. The
classes here are made from `qdrant_client`'s descriptors, with `data` of `Vector`, `VectorOutput` and `DenseVector` declared as
bytes, so a vector passes as `numpy.ndarray.tobytes()` instead of as a list of Python floats (ADR 0020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from qdrant_client.grpc import points_service_pb2

from embedd_dagster.core.rows import Vectors

_VECTORS: Final = frozenset({"Vector", "VectorOutput", "DenseVector"})
_SCALARS: Final[dict[type, str]] = {
    bool: "bool_value",
    int: "integer_value",
    float: "double_value",
    str: "string_value",
}


def _add(pool: Any, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add(pool, dependency, added)
    copy = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(copy)
    for message in copy.message_type:
        for field in message.field:
            if message.name in _VECTORS and field.name == "data":
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
                field.label = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
    pool.Add(copy)


_POOL = descriptor_pool.DescriptorPool()
_add(_POOL, points_service_pb2.DESCRIPTOR, set())


def message_class(name: str) -> type[Any]:
    """The class of Qdrant's message of that name, for example `UpsertPoints`."""
    message: type[Message] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"qdrant.{name}"))
    return message


CollectionExistsRequest = message_class("CollectionExistsRequest")
CollectionExistsResponse = message_class("CollectionExistsResponse")
GetPoints = message_class("GetPoints")
GetResponse = message_class("GetResponse")
PointsOperationResponse = message_class("PointsOperationResponse")
UpsertPoints = message_class("UpsertPoints")


def vector_bytes(vector: Vectors) -> bytes:
    """A vector as it stands in a message."""
    return vector.astype("<f4", copy=False).tobytes()


def read_vector(message: Any) -> Vectors:
    """The numbers of a `Vector` or `VectorOutput`, from the field of the two that is set; empty for another kind."""
    return np.frombuffer(message.data or message.dense.data, dtype="<f4")


def fill_payload(fields: Any, payload: Mapping[str, Any]) -> None:
    """Adds a JSON object to a map of messages `Value`. Raises UnicodeEncodeError for a lone surrogate.

    Fields are set one by one: a message made from nested dictionaries takes twice the CPU.
    """
    for key, value in payload.items():
        _fill_value(fields[key], value)


def _fill_value(message: Any, value: Any) -> None:
    if (field := _SCALARS.get(type(value))) is not None:
        setattr(message, field, value)
    elif isinstance(value, Mapping):
        message.struct_value.SetInParent()
        fill_payload(message.struct_value.fields, value)
    elif value is None:
        message.null_value = 0
    else:
        message.list_value.SetInParent()
        for item in value:
            _fill_value(message.list_value.values.add(), item)


def read_payload(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a map of messages `Value`."""
    return {key: _read_value(value) for key, value in fields.items()}


def _read_value(value: Any) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return read_payload(value.struct_value.fields)
        case "list_value":
            return [_read_value(item) for item in value.list_value.values]
        case "null_value" | None:
            return None
        case kind:
            return getattr(value, kind)
