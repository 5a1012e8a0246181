"""What the application passes to the HTTP protocol below it, through the state of its lifespan."""

from __future__ import annotations

from typing import Final, NamedTuple

STATE: Final = "http"
"""The name of `HttpFacts` in the lifespan state."""


class HttpFacts(NamedTuple):
    """The settings that the protocol needs."""

    api_url: str | None
    connections: int
