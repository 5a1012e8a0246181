"""API keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Name, Timestamp, valid_id


class ApiKeyCreate(Body):
    """A new API key."""

    name: Name = Field(description="What the key is for", examples=["search frontend"])
    permission: Literal["full", "read_only"] = Field(
        default="full", description="`read_only` keys may only send GET requests and queries"
    )
    environment_id: Annotated[str, AfterValidator(valid_id("env", "environment"))] | None = Field(
        default=None,
        description="Make the key valid in this environment only; null: in all environments of the organization",
    )


class ApiKeyAnswer(Answer):
    """An API key, without the key text."""

    id: str = Field(examples=["key_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str
    environment_id: str | None = Field(
        description="The only environment in which it is valid; null: all of the organization"
    )
    name: str
    permission: Literal["full", "read_only"]
    prefix: str = Field(description="Its first characters, to recognize it", examples=["sk_3Jx0aV9kQ"])
    created_at: Timestamp
    revoked_at: Timestamp | None = Field(description="When it was revoked; null: it is valid")


class NewApiKeyAnswer(Answer):
    """A new key. It is shown only once."""

    key: str = Field(description="The key itself. It is not stored and never shown again", examples=["sk_…"])
    api_key: ApiKeyAnswer


class ApiKeyList(ListAnswer[ApiKeyAnswer]):
    """A page of API keys."""
