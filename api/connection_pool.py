"""The open connections of one server: how many there may be, and which one is closed for a new one."""

from __future__ import annotations

import asyncio
import resource
from typing import Final, Protocol
from weakref import WeakKeyDictionary

from uvicorn.server import ServerState

_CHECK_SECONDS: Final = 1.0
_MIN_CONNECTIONS: Final = 8
_RESERVED_DESCRIPTORS: Final = 64
"""What the process itself needs at least, for databases, providers, the vector store and its event loop."""


class PooledConnection(Protocol):
    """What the pool asks of a connection."""

    loop: asyncio.AbstractEventLoop

    def check_times(self, now: float) -> None:
        """Rejects or closes what takes too long."""

    def close_for_another(self) -> None:
        """Closes the connection, because a new one needs its place."""


class ConnectionPool:
    """The open connections of one server. Only its event loop may use it."""

    def __init__(self, at_most: int) -> None:
        self._at_most = min(at_most, affordable_connections())
        self._timer: asyncio.TimerHandle | None = None
        self.open: dict[PooledConnection, None] = {}
        self.waiting: dict[PooledConnection, None] = {}
        """Connections that wait for a request or for the rest of one, the longest waiting first."""

    def admit(self, connection: PooledConnection) -> bool:
        """Adds a connection. At the limit, closes the one that has waited longest; False if all are working."""
        is_full = len(self.open) >= self._at_most
        if is_full and self.waiting:
            oldest = next(iter(self.waiting))
            self.remove(oldest)
            oldest.close_for_another()
            is_full = False
        self.open[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(_CHECK_SECONDS, self._check, connection.loop)
        return not is_full

    @property
    def is_crowded(self) -> bool:
        """Whether there is not even room for connections that are being rejected."""
        return len(self.open) > self._at_most + self._at_most // 8

    def wait(self, connection: PooledConnection) -> None:
        """Records that the connection starts to wait for a request."""
        self.waiting.pop(connection, None)
        self.waiting[connection] = None

    def remove(self, connection: PooledConnection) -> None:
        """Removes a connection. Idempotent."""
        self.open.pop(connection, None)
        self.waiting.pop(connection, None)

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.open):
            connection.check_times(now)
        self._timer = loop.call_later(_CHECK_SECONDS, self._check, loop) if self.open else None


_pools: WeakKeyDictionary[ServerState, ConnectionPool] = WeakKeyDictionary()


def pool_of(server: ServerState, at_most: int) -> ConnectionPool:
    """The pool of this server; created on the first call, for so many connections."""
    pool = _pools.get(server)
    if pool is None:
        pool = _pools[server] = ConnectionPool(at_most)
    return pool


def affordable_connections() -> int:
    """How many connections the file descriptors of the process allow, with a reserve for everything else it opens."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return max(_MIN_CONNECTIONS, soft - max(_RESERVED_DESCRIPTORS, soft // 4))
