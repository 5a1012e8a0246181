"""Limits on what a client may send and keep open, enforced below the application.

Uvicorn uses it with `--http embedd_api.http_limits:LimitedHttp`.

Uvicorn's fast protocol has none: a head may be of any size and take any time, and every connection stays open. The limits:
size of a head and number of its headers (431), time for a head and for a body (408), number of connections (503), requests
that are sent ahead on one connection, time without progress while an answer is read. One timer per process checks the
times once a second, so that a request itself costs two dictionary operations.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final, NamedTuple
from weakref import WeakKeyDictionary

import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from embedd_dagster.catalog.clock import new_id

from .error_codes import ERROR_CODES
from .errors import envelope
from .http_facts import STATE, HttpFacts

_SWEEP_SECONDS: Final = 1.0
_LINGER_BYTES: Final = 4 * 2**20
_LEAST_CONNECTIONS: Final = 8
_OWN_DESCRIPTORS: Final = 64
"""What the process needs for itself at least: databases, providers, Qdrant, its event loop."""
_log = structlog.get_logger("embedd.api")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client, and all together, may send and keep open."""

    head_bytes: int = 64 * 2**10
    headers: int = 100
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    unread_seconds: float = 30.0
    """How long an answer may wait for a client that reads nothing of it."""
    linger_seconds: float = 2.0
    """How long what is still sent is thrown away, so that a refusal reaches its client."""
    pipelined_requests: int = 16
    connections: int = 1000


class _Refusal(NamedTuple):
    code: str
    message: str
    resolution: str


_MALFORMED: Final = _Refusal("malformed_request", "This is not HTTP/1.1.", "Send an HTTP/1.1 request (RFC 9112).")
_TOO_LARGE: Final = _Refusal(
    "headers_too_large",
    "The request's path and headers are too large or too many.",
    "Send less: 64 KiB and 100 headers are accepted.",
)
_TOO_SLOW: Final = _Refusal("request_timeout", "The request did not arrive in time.", "Send it again, in one go.")
_BUSY: Final = _Refusal("server_busy", "Too many connections are open.", "Wait as long as Retry-After says.")


class _Refused(Exception):
    """Ends the parser's work on what is being received."""


class _Stage(Enum):
    """What of a request is being received."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()
    DISCARDED = auto()
    """It was refused; what still comes is thrown away."""


class _Pool:
    """The open connections of one server. Used in its event loop alone."""

    def __init__(self, most: int) -> None:
        self._most = min(most, affordable_connections())
        self._timer: asyncio.TimerHandle | None = None
        self.open: dict[LimitedHttp, None] = {}
        self.waiting: dict[LimitedHttp, None] = {}
        """Those that wait for (the rest of) a request, the longest waiting first."""

    def admit(self, connection: LimitedHttp) -> bool:
        """Takes a new connection in. At the limit the one that has waited longest goes; False if all are at work."""
        is_full = len(self.open) >= self._most
        if is_full and self.waiting:
            oldest = next(iter(self.waiting))
            self.remove(oldest)
            oldest.make_room()
            is_full = False
        self.open[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(_SWEEP_SECONDS, self._sweep, connection.loop)
        return not is_full

    @property
    def is_crowded(self) -> bool:
        """Whether there is no room even for those that are being refused."""
        return len(self.open) > self._most + self._most // 8

    def wait(self, connection: LimitedHttp) -> None:
        """The connection waits for a request from now on."""
        self.waiting.pop(connection, None)
        self.waiting[connection] = None

    def remove(self, connection: LimitedHttp) -> None:
        """Forgets a connection. Idempotent."""
        self.open.pop(connection, None)
        self.waiting.pop(connection, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self.open):
            connection.check_times(now)
        self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep, loop) if self.open else None


def affordable_connections() -> int:
    """How many connections the process' file descriptors allow, with a reserve for everything else that it opens."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**31
    return max(_LEAST_CONNECTIONS, soft - max(_OWN_DESCRIPTORS, soft // 4))


_pools: WeakKeyDictionary[ServerState, _Pool] = WeakKeyDictionary()


class LimitedHttp(HttpToolsProtocol):
    """Uvicorn's protocol over httptools, within limits. A refusal is an error envelope if an answer is possible."""

    limits: ClassVar[HttpLimits] = HttpLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.ws_protocol_class = None  # there are no WebSockets here, and their protocol has none of these limits
        facts = app_state.get(STATE)
        self._api_url = facts.api_url if isinstance(facts, HttpFacts) else None
        pool = _pools.get(server_state)
        if pool is None:
            most = facts.connections if isinstance(facts, HttpFacts) else self.limits.connections
            pool = _pools[server_state] = _Pool(most)
        self._pool = pool
        self._stage = _Stage.NOTHING
        self._since = self.loop.time()
        self._messages = 0
        self._piece = 0
        self._bytes = 0
        """Received of the present head; in a body, received since something of the body itself came."""
        self._has_body_grown = False
        self._refusal: _Refusal | None = None
        self._unread = 0
        self._unread_since = self._since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection in, or refuses it at once."""
        super().connection_made(transport)
        if self._pool.admit(self):
            self._pool.wait(self)
        elif self._pool.is_crowded:
            transport.abort()
        else:
            self._refuse(_BUSY)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._pool.remove(self)
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Ends, because another connection needs the place."""
        is_reading = self.transport.get_write_buffer_size() == 0
        if is_reading and self._stage in (_Stage.HEAD, _Stage.BODY):
            self._answer(_BUSY)
        self._give_up_request()
        if is_reading:
            self.transport.close()
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """A piece of a request, or of several."""
        if self._stage is _Stage.DISCARDED:
            self._bytes += len(data)
            if self._bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        before = self._stage, self._messages
        if self._stage is _Stage.NOTHING:
            self._stage, self._bytes = _Stage.HEAD, 0
        self._piece, self._has_body_grown = len(data), False
        super().data_received(data)
        if self._stage in (_Stage.HEAD, _Stage.BODY):
            self._note_incomplete(*before)

    def _note_incomplete(self, stage_before: _Stage, messages_before: int) -> None:
        """The piece has ended within a head or a body."""
        is_same = (stage_before, messages_before) == (self._stage, self._messages)
        is_first = (
            stage_before is _Stage.NOTHING and self._stage is _Stage.HEAD and self._messages <= messages_before + 1
        )
        if not is_same:
            self._since = self.loop.time()
            if self in self._pool.waiting:
                self._pool.wait(self)
        # if something else ended in the piece, it is not known how much belongs to this: nothing is counted
        self._bytes = self._bytes + self._piece if (is_same or is_first) and not self._has_body_grown else 0
        if self._bytes > self.limits.head_bytes:
            self._refuse(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The parser has seen the begin of a head."""
        self._messages += 1
        self._stage = _Stage.HEAD
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is complete: its request begins, or is queued behind the one that is being answered."""
        if self._is_head_too_large():
            self._refusal = _TOO_LARGE
            raise _Refused
        if len(self.pipeline) >= self.limits.pipelined_requests:
            self._refusal = _BUSY
            raise _Refused
        self._stage, self._bytes = _Stage.BODY, 0
        super().on_headers_complete()
        self.headers = []  # trailers of the body do not join the head that the application reads

    def _is_head_too_large(self) -> bool:
        limits = self.limits
        if len(self.headers) > limits.headers:
            return True
        if self._bytes + self._piece <= limits.head_bytes:
            return False
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > limits.head_bytes

    def on_body(self, body: bytes) -> None:
        """Something of a body."""
        self._has_body_grown = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        self._stage = _Stage.NOTHING
        self._pool.waiting.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        if not self.pipeline and self in self._pool.open:
            self._since = self.loop.time()
            self._pool.wait(self)

    def check_times(self, now: float) -> None:
        """Ends what takes too long."""
        limits, waited = self.limits, now - self._since
        if self._stage is _Stage.DISCARDED:
            if waited > limits.linger_seconds:
                self.transport.abort()
        elif self.flow.write_paused or self.transport.is_closing():
            self._check_reader(now)
        elif self._is_busy:
            return
        elif self.flow.read_paused:
            self._since = now
        elif self._stage is _Stage.NOTHING:
            # after a request, Uvicorn's own timer does this
            if self._messages == 0 and waited > self.timeout_keep_alive:
                self.transport.close()
        elif waited > (limits.head_seconds if self._stage is _Stage.HEAD else limits.body_seconds):
            self._refuse(_TOO_SLOW)

    @property
    def _is_busy(self) -> bool:
        """Whether a request that has come whole is being answered."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not cycle.more_body)

    def _check_reader(self, now: float) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread != self._unread:
            self._unread, self._unread_since = unread, now
        elif now - self._unread_since > self.limits.unread_seconds:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - what is sent is an envelope
        """What Uvicorn calls for everything that its parser does not take."""
        self._refuse(self._refusal or _MALFORMED)

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing: anybody may ask for another protocol, and gets HTTP/1.1."""

    def _refuse(self, refusal: _Refusal) -> None:
        """Answers, unless this would be taken for another request's answer, and ends the connection."""
        if self.transport.is_closing():
            return
        _log.warning("request refused", code=refusal.code)
        if self.pipeline:
            self.transport.abort()
            return
        if self._is_busy:
            # the request before is still answered, and nothing after it
            self.cycle.keep_alive = False
            self._stage, self._since, self._bytes = _Stage.DISCARDED, float("inf"), 0
            return
        is_answered = self._answer(refusal)
        self._give_up_request()
        if not is_answered or not self.transport.can_write_eof():
            self.transport.close()
            return
        # closed at once, with something unread, the connection would be reset and the answer lost
        self.transport.write_eof()
        self._stage, self._since, self._bytes = _Stage.DISCARDED, self.loop.time(), 0
        self._pool.waiting.pop(self, None)
        self.flow.resume_reading()

    def _answer(self, refusal: _Refusal) -> bool:
        """Writes the envelope; False if the application has begun to answer."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            return False
        request_id = new_id("req")
        body = envelope(*refusal, base_url=self._base_url(), request_id=request_id)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": request_id,
            "x-content-type-options": "nosniff",
        }
        if refusal is _BUSY:
            headers["retry-after"] = "1"
        self.transport.write(_head(ERROR_CODES[refusal.code].status, headers) + body)
        return True

    def _give_up_request(self) -> None:
        """The application, which may be waiting for the rest of a body, hears that the client is gone."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    def _base_url(self) -> str:
        if self._api_url:
            return self._api_url.rstrip("/")
        host, port = self.server or ("localhost", None)
        named = f"[{host}]" if ":" in host else host
        return f"{self.scheme}://{named}" + (f":{port}" if port else "")


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[status] + lines.encode("ascii") + b"\r\n"
