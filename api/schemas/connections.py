"""Connections to source databases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, GetJsonSchemaHandler, StringConstraints, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from ..pagination import ListAnswer
from ..postgresql_url import read_postgresql_url
from ..schemas.base import Answer, Body, Name, Timestamp, unset


def _one_host(value: str) -> str:
    if "," in value or any(character.isspace() for character in value):
        raise PydanticCustomError("host", "exactly one host name or address is accepted")
    return value


_Text = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class PostgresqlCredentials(Body):
    """How to reach a PostgreSQL database: by `url`, or by the single fields.

    Encrypted at rest; the password is never returned.
    """

    url: str | None = Field(
        default=None,
        exclude=True,
        max_length=4096,
        description="All of the others in one: `postgresql://user:password@host:port/database?sslmode=require`, "
        "with special characters percent-encoded. No other parameter is accepted",
        json_schema_extra={"writeOnly": True},
    )

    host: Annotated[_Text, AfterValidator(_one_host)] = Field(
        description="Host name or address. A pooler such as PgBouncer will do, in transaction mode for all but sync_mode cdc",
        examples=["db.example.com"],
        json_schema_extra={"pattern": r"^[^,\s\u0000]+$"},
    )
    port: int = Field(default=5432, ge=1, le=65535)
    database: _Text = Field(examples=["shop"])
    user: _Text = Field(description="A role that may SELECT (in platform mode also CREATE)", examples=["embedd"])
    password: Annotated[str, StringConstraints(max_length=1024)] = Field(
        default="", json_schema_extra={"writeOnly": True}
    )
    ssl_mode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        default="prefer",
        description="As libpq's sslmode. A server that asks for the password in clear needs verify-ca or verify-full",
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, without required fields: `url` stands for them. Client generators do not take a choice here."""
        found = super().__get_pydantic_json_schema__(schema, handler)
        handler.resolve_ref_schema(found).pop("required", None)
        return found

    @model_validator(mode="before")
    @classmethod
    def _take_url(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("url") is None:
            return data
        if len(data) > 1:
            other = next(name for name in data if name != "url")
            raise PydanticCustomError(
                "url", "url: it is given instead of the single fields, not with {other}", {"other": repr(other[:64])}
            )
        return read_postgresql_url(data["url"])


class PostgresqlPassword(Body):
    """Another password; everything else of the credentials stays as it is."""

    password: Annotated[str, StringConstraints(max_length=1024)] = Field(json_schema_extra={"writeOnly": True})


def _which(value: Any) -> str:
    is_password = isinstance(value, PostgresqlPassword) or (isinstance(value, dict) and set(value) == {"password"})
    return "~password" if is_password else "~all"


class PostgresqlConnectionCreate(Body):
    """A new connection to a PostgreSQL database."""

    name: Name = Field(description="Unique in the environment", examples=["shop"])
    mode: Literal["managed", "platform"] = Field(
        description="Where the vectors of its vector tables live: `managed` in our Qdrant, `platform` in this database"
    )
    credentials: PostgresqlCredentials


class ConnectionUpdate(Body):
    """What may be changed of a connection; what is left out stays."""

    immutable_fields = frozenset({"id", "org_id", "environment_id", "provider", "mode", "status"})

    name: Name = Field(default_factory=unset, description="Another name")
    credentials: Annotated[
        Annotated[PostgresqlCredentials, Tag("~all")] | Annotated[PostgresqlPassword, Tag("~password")],
        Discriminator(_which),
    ] = Field(
        default_factory=unset,
        description="The password alone, or all of them: the stored password is never sent to another host. They are "
        "tested at once",
    )


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
