"""What all bodies and answers share: strictness, timestamps, names and ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from api.strict_json import RawBody, parse_json
from embedd_dagster.errors import NotFound, ValidationFailed

_MAX_SHOWN: Final = 64
_ID: Final = re.compile(r"[a-z]{2,8}_[0-9a-z]{26}")


class Body(BaseModel):
    """A request body: strict types, and no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")

    immutable_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of the resource that cannot be changed: refused with a reason of its own."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, RawBody):
            data = parse_json(data.content)
        elif isinstance(data, bytes):
            raise ValidationFailed(
                "Content-Type: `application/json` is expected.", resolution="Send Content-Type: application/json."
            )
        if isinstance(data, dict):
            cls._refuse_unknown(data)
        return data

    @classmethod
    def _refuse_unknown(cls, data: dict[str, Any]) -> None:
        for name in data:
            if name in cls.model_fields:
                continue
            accepted = {"name": repr(name[:_MAX_SHOWN]), "accepted": ", ".join(cls.model_fields)}
            if name in cls.immutable_fields:
                raise PydanticCustomError(
                    "immutable_field", "field {name} cannot be changed; accepted: {accepted}", accepted
                )
            raise PydanticCustomError("unknown_field", "field {name} is not known; accepted: {accepted}", accepted)


class Answer(BaseModel):
    """An answer's body."""

    model_config = ConfigDict(extra="forbid")


def _instant(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Timestamp = Annotated[datetime, PlainSerializer(_instant, return_type=str, when_used="always")]
"""ISO 8601 in UTC, with milliseconds and `Z`."""


def _without_controls(value: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise PydanticCustomError("control_character", "control characters are not accepted")
    return value


Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100),
    AfterValidator(_without_controls),
]
"""A name for people: any characters but controls."""


def unset() -> Any:
    """The default of a field that may be left out but not be null; `model_fields_set` tells whether it was given."""
    return None


def known_form(prefix: str, resource: str) -> Callable[[str], str]:
    """Lets ids of this prefix pass; anything else is a NotFound at once, as no such object can be."""

    def check(value: str) -> str:
        if not value.startswith(f"{prefix}_") or not _ID.fullmatch(value):
            raise NotFound(resource, value[:_MAX_SHOWN])
        return value

    return check


def _in_path(prefix: str, noun: str) -> Any:
    return Path(description=f"The {noun}'s id", examples=[f"{prefix}_1q3k8zc0v5tq9n2m4x7wb6dhpa"])


EnvironmentId = Annotated[str, _in_path("env", "environment"), AfterValidator(known_form("env", "environment"))]
ApiKeyId = Annotated[str, _in_path("key", "api key"), AfterValidator(known_form("key", "api_key"))]
ConnectionId = Annotated[str, _in_path("conn", "connection"), AfterValidator(known_form("conn", "connection"))]
EmbeddingProviderId = Annotated[
    str, _in_path("ep", "embedding provider"), AfterValidator(known_form("ep", "embedding_provider"))
]
VectorTableId = Annotated[str, _in_path("vt", "vector table"), AfterValidator(known_form("vt", "vector_table"))]
TaskId = Annotated[str, _in_path("task", "task"), AfterValidator(known_form("task", "task"))]
