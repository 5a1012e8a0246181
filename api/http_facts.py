"""What the application tells the HTTP protocol below it, by the state of its lifespan."""

from __future__ import annotations

from typing import Final, NamedTuple

STATE: Final = "http"
"""Under which name it stands in the state."""


class HttpFacts(NamedTuple):
    """The settings that the protocol needs."""

    api_url: str | None
    connections: int
