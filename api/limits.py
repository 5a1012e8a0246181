"""How many requests may do the same kind of slow work at once, so that the others find a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from fastapi import Depends, Request

from embedd_dagster.errors import TransientError


class ServerBusy(TransientError):
    """Too many requests wait for databases and providers."""

    default_code = "server_busy"
    default_resolution = "Wait as long as Retry-After says. If it happens often, find the slow database or provider."


class TooManyQueries(TransientError):
    """Too many queries wait for a thread: another one would not be answered in time."""

    default_code = "too_many_queries"
    default_resolution = (
        "Wait as long as Retry-After says. If it happens often, add API processes or use a faster provider."
    )


class ConcurrencyLimit:
    """At most `at_most` requests inside `with limit:` at once. Only the event loop uses it, so it needs no lock."""

    def __init__(self, at_most: int, error: type[TransientError], message: str) -> None:
        self.at_most = at_most
        self._error = error
        self._message = message
        self._count = 0

    def __enter__(self) -> None:
        """Counts one more. Raises the limit's error if there are `at_most` already."""
        if self._count >= self.at_most:
            raise self._error(self._message, retry_after_seconds=1.0)
        self._count += 1

    def __exit__(self, *_exception: object) -> None:
        self._count -= 1


async def _limit_external_calls(request: Request) -> AsyncIterator[None]:
    with request.app.state.embedd.external_calls:
        yield


EXTERNAL_CALLS: Final = [Depends(_limit_external_calls)]
"""The `dependencies` of an operation that calls a source, a platform store or a provider; it may answer `server_busy`.

They run after those of the router, which authenticate the request.
"""
