"""Liveness and readiness."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from embedd_dagster.connectors import registry

from ..error_codes import ErrorBody
from ..schemas.base import Answer, NameIn


class HealthAnswer(Answer):
    """The process lives."""

    status: Literal["ok"]


class ServiceAnswer(Answer):
    """What answers here."""

    name: Literal["embedd"]
    version: str
    links: dict[str, str] = Field(description="Where to go on", examples=[{"documentation": "/docs"}])


class PartAnswer(Answer):
    """One of the systems that the service stands on."""

    status: Literal["ok", "down", "not_configured"]
    latency_ms: float | None
    error: str | None


class ReadyAnswer(Answer):
    """Whether everything that the service stands on (or what was asked for) answers."""

    status: Literal["ready", "not_ready"]
    checks: dict[Annotated[str, NameIn(lambda: ("catalog", "dagster", *registry.managed_stores()))], PartAnswer]


class NotReadyAnswer(ReadyAnswer):
    """What does not answer."""

    error: ErrorBody = Field(description="The first part that is down")
