"""The credentials of a PostgreSQL connection, as a user gives them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, GetJsonSchemaHandler, SecretStr, StringConstraints, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from embedd_dagster.connectors.postgresql.url import read_postgresql_url
from embedd_dagster.connectors.strict_model import StrictModel


def _one_host(value: str) -> str:
    if "," in value or any(character.isspace() for character in value):
        raise PydanticCustomError("host", "exactly one host name or address is accepted")
    return value


_Text = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class PostgresqlCredentials(StrictModel):
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
    password: SecretStr = Field(default=SecretStr(""), max_length=1024)
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
