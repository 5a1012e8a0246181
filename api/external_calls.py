"""Requests that wait for somebody else's system, a slow one perhaps: so few at once that the others find a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from fastapi import Depends

from embedd_dagster.errors import TransientError

from .auth import Reader

AT_ONCE: Final = 24
"""Of the forty threads that there are for all endpoints but queries, which have their own."""


class ServerBusy(TransientError):
    """So many requests wait for slow systems that another one is not begun."""

    default_code = "server_busy"
    default_resolution = "Wait as long as Retry-After says. If it goes on: see which databases or providers are slow."


async def _visit(caller: Reader) -> AsyncIterator[None]:
    state = caller.state.outside
    if state.number >= AT_ONCE:
        raise ServerBusy("Too many requests wait for databases and providers.", retry_after_seconds=1.0)
    state.number += 1
    try:
        yield
    finally:
        state.number -= 1


OUTSIDE: Final = [Depends(_visit)]
"""The `dependencies` of an operation that talks to a source, a platform store or a provider; it may answer `server_busy`."""
