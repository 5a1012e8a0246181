"""Limits on what a client may send and keep open, enforced below the application.

Uvicorn uses it with `--http embedd_api.http_limits:LimitedHttp`. Its own protocol has no limits: a head may have any size and
take any time, and every connection stays open. The limits: size and number of headers (431), time for a head and for a body
(408), number of connections (503), requests sent ahead on one connection, time without progress while a response is read. One
timer per process checks the times once a second, so that a request costs only two dictionary operations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final, NamedTuple

import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from embedd_dagster.catalog.clock import new_id

from .connection_pool import pool_of
from .error_codes import ERROR_CODES
from .errors import envelope
from .http_facts import STATE, HttpFacts

_LINGER_BYTES: Final = 4 * 2**20
_log = structlog.get_logger("embedd.api")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client, and all clients together, may send and keep open."""

    head_bytes: int = 64 * 2**10
    headers: int = 100
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    unread_seconds: float = 30.0
    """How long a response may wait for a client that does not read it."""
    linger_seconds: float = 2.0
    """How long the rest of a rejected request is read and discarded, so that the error reaches the client."""
    pipelined_requests: int = 16
    connections: int = 1000


class _Rejection(NamedTuple):
    code: str
    message: str
    resolution: str


_MALFORMED: Final = _Rejection(
    "malformed_request", "The bytes received are not an HTTP/1.1 request.", "Send an HTTP/1.1 request (RFC 9112)."
)
_TOO_LARGE: Final = _Rejection(
    "headers_too_large",
    "The request's path and headers are too large or too many.",
    "Send at most 64 KiB and 100 headers.",
)
_TOO_SLOW: Final = _Rejection(
    "request_timeout", "The request did not arrive in time.", "Send the whole request again, without pauses."
)
_BUSY: Final = _Rejection("server_busy", "Too many connections are open.", "Wait as long as Retry-After says.")


class _Rejected(Exception):
    """Stops the parser."""


class _Stage(Enum):
    """Which part of a request the connection is receiving."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()
    DISCARDED = auto()
    """The request was rejected; the rest of it is discarded."""


class LimitedHttp(HttpToolsProtocol):
    """Uvicorn's protocol over httptools, with limits. It rejects with an error envelope if a response is possible."""

    limits: ClassVar[HttpLimits] = HttpLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.ws_protocol_class = None  # the API has no WebSockets, and their protocol has no limits
        facts = app_state.get(STATE)
        self._api_url = facts.api_url if isinstance(facts, HttpFacts) else None
        at_most = facts.connections if isinstance(facts, HttpFacts) else self.limits.connections
        self._pool = pool_of(server_state, at_most)
        self._stage = _Stage.NOTHING
        self._since = self.loop.time()
        self._messages = 0
        self._part = 0
        self._bytes = 0
        """Bytes of the current head; in a body, bytes since the last piece of the body itself."""
        self._has_body_grown = False
        self._rejection: _Rejection | None = None
        self._unread = 0
        self._unread_since = self._since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Adds the connection to the pool, or rejects it."""
        super().connection_made(transport)
        if self._pool.admit(self):
            self._pool.wait(self)
        elif self._pool.is_crowded:
            transport.abort()
        else:
            self._reject(_BUSY)

    def connection_lost(self, exc: Exception | None) -> None:
        """Removes the connection from the pool."""
        self._pool.remove(self)
        super().connection_lost(exc)

    def close_for_another(self) -> None:
        """Closes the connection, because the pool is full and a new one needs its place."""
        is_reading = self.transport.get_write_buffer_size() == 0
        if is_reading and self._stage in (_Stage.HEAD, _Stage.BODY):
            self._answer(_BUSY)
        self._disconnect_application()
        if is_reading:
            self.transport.close()
        else:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Receives a part of a request, or of several requests."""
        if self._stage is _Stage.DISCARDED:
            self._bytes += len(data)
            if self._bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        before = self._stage, self._messages
        if self._stage is _Stage.NOTHING:
            self._stage, self._bytes = _Stage.HEAD, 0
        self._part, self._has_body_grown = len(data), False
        super().data_received(data)
        if self._stage in (_Stage.HEAD, _Stage.BODY):
            self._count_incomplete(*before)

    def _count_incomplete(self, stage_before: _Stage, messages_before: int) -> None:
        """The received part ends inside a head or a body: counts its bytes and restarts the clock of a new head or body."""
        is_same = (stage_before, messages_before) == (self._stage, self._messages)
        is_first = (
            stage_before is _Stage.NOTHING and self._stage is _Stage.HEAD and self._messages <= messages_before + 1
        )
        if not is_same:
            self._since = self.loop.time()
            if self in self._pool.waiting:
                self._pool.wait(self)
        # if another head or body ended in the same part, its share of the bytes is unknown: counts nothing
        self._bytes = self._bytes + self._part if (is_same or is_first) and not self._has_body_grown else 0
        if self._bytes > self.limits.head_bytes:
            self._reject(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._messages += 1
        self._stage = _Stage.HEAD
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is complete: its request starts, or is queued behind the one in progress."""
        if self._is_head_too_large():
            self._rejection = _TOO_LARGE
            raise _Rejected
        if len(self.pipeline) >= self.limits.pipelined_requests:
            self._rejection = _BUSY
            raise _Rejected
        self._stage, self._bytes = _Stage.BODY, 0
        super().on_headers_complete()
        self.headers = []  # trailers of the body must not be added to the headers that the application reads

    def _is_head_too_large(self) -> bool:
        limits = self.limits
        if len(self.headers) > limits.headers:
            return True
        if self._bytes + self._part <= limits.head_bytes:
            return False
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > limits.head_bytes

    def on_body(self, body: bytes) -> None:
        """Receives a part of a body."""
        self._has_body_grown = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request was received completely."""
        self._stage = _Stage.NOTHING
        self._pool.waiting.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A response was sent completely."""
        super().on_response_complete()
        if not self.pipeline and self in self._pool.open:
            self._since = self.loop.time()
            self._pool.wait(self)

    def check_times(self, now: float) -> None:
        """Rejects or closes what takes too long."""
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
            # after the first request, Uvicorn's own timer does this
            if self._messages == 0 and waited > self.timeout_keep_alive:
                self.transport.close()
        elif waited > (limits.head_seconds if self._stage is _Stage.HEAD else limits.body_seconds):
            self._reject(_TOO_SLOW)

    @property
    def _is_busy(self) -> bool:
        """Whether a completely received request is being answered."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not cycle.more_body)

    def _check_reader(self, now: float) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread != self._unread:
            self._unread, self._unread_since = unread, now
        elif now - self._unread_since > self.limits.unread_seconds:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the response is an error envelope
        """Uvicorn calls this for everything that its parser rejects."""
        self._reject(self._rejection or _MALFORMED)

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing: a client may ask for another protocol, and gets HTTP/1.1."""

    def _reject(self, rejection: _Rejection) -> None:
        """Sends the error, unless the client would take it for the response to an earlier request, and closes the connection."""
        if self.transport.is_closing():
            return
        _log.warning("request rejected", code=rejection.code)
        if self.pipeline:
            self.transport.abort()
            return
        if self._is_busy:
            # finish the response to the earlier request, then close
            self.cycle.keep_alive = False
            self._stage, self._since, self._bytes = _Stage.DISCARDED, float("inf"), 0
            return
        is_answered = self._answer(rejection)
        self._disconnect_application()
        if not is_answered or not self.transport.can_write_eof():
            self.transport.close()
            return
        # closing now, with unread data, would reset the connection and lose the response
        self.transport.write_eof()
        self._stage, self._since, self._bytes = _Stage.DISCARDED, self.loop.time(), 0
        self._pool.waiting.pop(self, None)
        self.flow.resume_reading()

    def _answer(self, rejection: _Rejection) -> bool:
        """Writes the envelope. False if the application has already started its response."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            return False
        request_id = new_id("req")
        body = envelope(*rejection, base_url=self._base_url(), request_id=request_id)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": request_id,
            "x-content-type-options": "nosniff",
        }
        if rejection is _BUSY:
            headers["retry-after"] = "1"
        self.transport.write(_head(ERROR_CODES[rejection.code].status, headers) + body)
        return True

    def _disconnect_application(self) -> None:
        """Reports the client as disconnected to the application, which may be waiting for the rest of a body."""
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
