"""What all request and response bodies share: strictness, timestamps, names and ids."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from embedd_dagster.connectors.strict_model import StrictModel
from embedd_dagster.errors import NotFound

from ..strict_json import parse_body

_MAX_SHOWN: Final = 64
_ID: Final = re.compile(r"[a-z]{2,8}_[0-9a-z]{26}")


class Body(StrictModel):
    """A request body, which is parsed when it is validated."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        data = parse_body(data)
        if isinstance(data, dict):
            cls._reject_unknown(data)
        return data


@dataclass(frozen=True, slots=True)
class NameIn:
    """Marks a text that is one of these names: those of the registry when a value is validated or a schema is made."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of a text that is checked."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, which lists the names."""
        return {**handler(schema), "enum": list(self.names())}

    def _check(self, value: str) -> str:
        names = [repr(name) for name in self.names()]
        if repr(value) not in names:
            expected = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value


class Answer(BaseModel):
    """A response body. `model_validate` makes it from a row of the catalog, by the attributes with the names of its fields."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)


def _instant(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Timestamp = Annotated[datetime, PlainSerializer(_instant, return_type=str, when_used="always")]
"""ISO 8601 in UTC, with milliseconds and `Z`."""


_MAX_NAME: Final = 100
_CONTROLS: Final = r"\u0000-\u001f\u007f-\u009f"
_NAME_PATTERN: Final = rf"^[^{_CONTROLS}]*[^\s{_CONTROLS}][^{_CONTROLS}]*$"


def _check_before_stripping(value: Any) -> Any:
    """Checks the text before blanks are stripped, as the JSON schema does."""
    if isinstance(value, str):
        if any(unicodedata.category(character) == "Cc" for character in value):
            raise PydanticCustomError("control_character", "control characters are not accepted")
        if len(value) > _MAX_NAME:
            raise PydanticCustomError(
                "string_too_long", "at most 100 characters are accepted", {"max_length": _MAX_NAME}
            )
    return value


Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=_MAX_NAME),
    BeforeValidator(_check_before_stripping),
    Field(json_schema_extra={"pattern": _NAME_PATTERN}),
]
"""A name for people: any characters except control characters."""


def unset() -> Any:
    """The default of a field that is optional but not nullable; `model_fields_set` shows whether it was given."""
    return None


def valid_id(prefix: str, resource: str) -> Callable[[str], str]:
    """A validator for ids with this prefix. Raises NotFound for any other text: no object can have it as its id."""

    def check(value: str) -> str:
        if not value.startswith(f"{prefix}_") or not _ID.fullmatch(value):
            raise NotFound(resource, value[:_MAX_SHOWN])
        return value

    return check


def _in_path(prefix: str, noun: str) -> Any:
    return Path(description=f"The {noun}'s id", examples=[f"{prefix}_1q3k8zc0v5tq9n2m4x7wb6dhpa"])


EnvironmentId = Annotated[str, _in_path("env", "environment"), AfterValidator(valid_id("env", "environment"))]
ApiKeyId = Annotated[str, _in_path("key", "api key"), AfterValidator(valid_id("key", "api_key"))]
ConnectionId = Annotated[str, _in_path("conn", "connection"), AfterValidator(valid_id("conn", "connection"))]
EmbeddingProviderId = Annotated[
    str, _in_path("ep", "embedding provider"), AfterValidator(valid_id("ep", "embedding_provider"))
]
VectorTableId = Annotated[str, _in_path("vt", "vector table"), AfterValidator(valid_id("vt", "vector_table"))]
TaskId = Annotated[str, _in_path("task", "task"), AfterValidator(valid_id("task", "task"))]
