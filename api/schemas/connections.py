"""Connections to source databases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from api.pagination import ListAnswer
from api.schemas.base import Answer, Body, Name, Timestamp, unset


def _one_host(value: str) -> str:
    if "," in value or any(character.isspace() for character in value):
        raise PydanticCustomError("host", "exactly one host name or address is accepted")
    return value


_Text = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class PostgresqlCredentials(Body):
    """How to reach a PostgreSQL database. Encrypted at rest; the password is never returned."""

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
    credentials: PostgresqlCredentials = Field(
        default_factory=unset,
        description="All of them anew: the stored password is never sent to another host. They are tested at once",
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


class SourceTableList(Answer):
    """The tables and views that may be read."""

    tables: list[SourceTableAnswer]
    truncated: bool = Field(description="Whether there are more than were asked for")
