"""Connections to source databases. The models of credentials are those of the registered connectors."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, Field, create_model
from pydantic_core import PydanticUndefined

from embedd_dagster.connectors import registry
from embedd_dagster.connectors.strict_model import StrictModel, secret_fields

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Name, Timestamp, unset
from ..strict_json import validate_value


def connection_create_model(provider: str) -> type[Body]:
    """The body that creates a connection of this provider: its mode, if its database can hold vectors, and credentials."""
    spec = registry.connector(provider)
    modes: Any = Literal["managed", "platform"] if spec.platform_store else Literal["managed"]
    return create_model(
        f"{_prefix(provider)}ConnectionCreate",
        __base__=Body,
        __doc__=f"A new connection to a {spec.title} database.",
        name=(Name, Field(description="Unique in the environment", examples=["shop"])),
        mode=(
            modes,
            Field(
                description="Where the vectors of its vector tables live: `managed` in the vector store of this "
                "installation, `platform` in this database"
            ),
        ),
        credentials=(registry.source_spec(provider).credentials, ...),
    )


@cache
def _secrets_model(provider: str, model: type[BaseModel]) -> type[StrictModel] | None:
    """A model of the secrets alone, all of them required; None for credentials without one."""
    names = secret_fields(model)
    if not names:
        return None
    fields: dict[str, Any] = {}
    for name in names:
        field = copy(model.model_fields[name])
        field.default = PydanticUndefined
        fields[name] = (field.annotation, field)
    return create_model(
        _prefix(provider) + "".join(_prefix(name) for name in names),
        __base__=StrictModel,
        __doc__=f"Another {' and '.join(names)}; everything else of the credentials stays as it is.",
        **fields,
    )


def _prefix(name: str) -> str:
    return name.title().replace("_", "")


def read_new_credentials(provider: str, settings: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """The credentials that replace those of a connection with these settings; secrets alone leave the settings as they are.

    Raises RequestValidationError.
    """
    model = registry.source_spec(provider).credentials
    secrets = _secrets_model(provider, model)
    if secrets is not None and isinstance(given, dict) and set(given) == set(secrets.model_fields):
        return {**settings, **validate_value(secrets, given, "credentials").model_dump()}
    return validate_value(model, given, "credentials").model_dump()


class ConnectionUpdate(Body):
    """What may be changed of a connection; what is left out stays."""

    immutable_fields = frozenset({"id", "org_id", "environment_id", "provider", "mode", "status"})

    name: Name = Field(default_factory=unset, description="Another name")
    credentials: Any = Field(default_factory=unset)


def connection_update_model() -> type[ConnectionUpdate]:
    """The body that updates a connection of any provider.

    Its schema lists the credentials of all of them; `read_new_credentials` validates by the connection's own.
    """
    models: Any = Any
    for provider in registry.sources():
        model = registry.source_spec(provider).credentials
        models |= model
        secrets = _secrets_model(provider, model)
        if secrets is not None:
            models |= secrets
    credentials: Any = Field(
        default_factory=unset,
        union_mode="left_to_right",
        json_schema_extra=_without_any,
        description="The secrets alone, or all of them: the stored secrets are never sent to another host. They are "
        "tested at once",
    )
    return create_model(
        "ConnectionUpdate",
        __base__=ConnectionUpdate,
        __doc__=ConnectionUpdate.__doc__,
        credentials=(models, credentials),
    )


def _without_any(schema: dict[str, Any]) -> None:
    """Makes a choice between models of the union whose first member accepts anything."""
    schema["oneOf"] = schema.pop("anyOf")[1:]


class ConnectionAnswer(Answer):
    """A connection, without its secrets."""

    id: str = Field(examples=["conn_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str
    environment_id: str
    name: str
    provider: str = Field(examples=["postgresql"])
    mode: Literal["managed", "platform"]
    status: Literal["pending", "connected", "failed"] = Field(description="The outcome of the last test")
    settings: dict[str, Any] = Field(
        description="The credentials that are not secret", examples=[{"host": "db.example.com", "port": 5432}]
    )
    last_error: str | None = Field(description="Why the last test failed")
    tested_at: Timestamp | None
    created_at: Timestamp
    updated_at: Timestamp


class ConnectionList(ListAnswer[ConnectionAnswer]):
    """A page of connections."""


class TestAnswer(Answer):
    """The outcome of a test."""

    __test__ = False

    status: Literal["ok", "failed"]
    latency_ms: float = Field(description="How long the test took", examples=[12.3])
    error: str | None = Field(description="Why it failed, and what to do", examples=[None])


class SourceTableAnswer(Answer):
    """A table or view of the source."""

    name: str = Field(description="As `source_table` may spell it", examples=["products"])
    type: Literal["table", "view"]
    row_estimate: int | None = Field(description="By the source's statistics; null where it has none")


class SourceTableColumnAnswer(Answer):
    """A column of a table of the source, and what a vector table may use it for."""

    name: str = Field(examples=["ID"])
    type: str = Field(description="The source's own type name", examples=["NUMBER"])
    nullable: bool
    filter_types: list[str] = Field(
        description="The `filter_type`s that its values fit", examples=[["integer", "float"]]
    )
    can_be_key: bool = Field(description="Whether a `primary_key_column` may be of this type")


class SourceTableColumnList(ListAnswer[SourceTableColumnAnswer]):
    """A page of columns, in the table's own order."""


class SourceTableList(Answer):
    """The tables and views that may be read."""

    tables: list[SourceTableAnswer]
    truncated: bool = Field(description="Whether there are more than were asked for")
