"""The base of models for what a user sends: strict types, no unknown fields, no text with NUL."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, SecretStr, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

_MAX_SHOWN: Final = 64


def _forbid_nul(described: dict[str, Any]) -> None:
    for variant in (described, *described.get("anyOf", [])):
        if variant.get("type") == "string" and not {"pattern", "enum", "const"} & variant.keys():
            variant["pattern"] = r"^[^\u0000]*$"


class StrictModel(BaseModel):
    """Strict types, no unknown fields. A field that must not be shown or stored in clear is a `SecretStr`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    immutable_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of the resource that cannot be changed: the message says so."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema. It says that no text may contain NUL, which no database can hold."""
        found = handler.resolve_ref_schema(handler(schema))
        for described in found.get("properties", {}).values():
            _forbid_nul(described)
        return found

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, dict):
            cls._reject_unknown(data)
        return data

    @classmethod
    def _reject_unknown(cls, data: dict[str, Any]) -> None:
        for name in data:
            if name in cls.model_fields:
                continue
            accepted = {"name": repr(name[:_MAX_SHOWN]), "accepted": ", ".join(cls.model_fields)}
            if name in cls.immutable_fields:
                raise PydanticCustomError(
                    "immutable_field", "field {name} cannot be changed; accepted: {accepted}", accepted
                )
            raise PydanticCustomError("unknown_field", "field {name} is not known; accepted: {accepted}", accepted)


def secret_fields(model: type[BaseModel]) -> tuple[str, ...]:
    """The fields that hold a secret."""
    return tuple(name for name, field in model.model_fields.items() if field.annotation is SecretStr)
