"""Environments."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Timestamp


class EnvironmentCreate(Body):
    """A new environment."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]{1,50}$")] = Field(
        description="1 to 50 of a-z, 0-9, - and _; unique in the organization", examples=["staging"]
    )


class EnvironmentAnswer(Answer):
    """A part of the organization: each connection, provider and vector table belongs to one environment."""

    id: str = Field(examples=["env_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str = Field(examples=["org_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    name: str = Field(examples=["prod"])
    created_at: Timestamp


class EnvironmentList(ListAnswer[EnvironmentAnswer]):
    """A page of environments."""
