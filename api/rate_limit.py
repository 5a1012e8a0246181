"""Rate limits: requests per minute and API key, in a moving window, counted in Redis or in this process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import structlog
from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import MovingWindowRateLimiter

from embedd_dagster.errors import ConfigurationError, RequestError
from embedd_dagster.settings import Settings

_WINDOW_SECONDS: Final = 60
_log = structlog.get_logger("embedd.api")


class RateLimitExceeded(RequestError):
    """Too many requests per minute with one key."""

    default_code = "rate_limit_exceeded"
    default_resolution = "Wait as long as Retry-After says. EMBEDD_RATE_LIMIT_PER_MINUTE sets the limit."

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How much of its limit a key has used."""

    limit: int
    remaining: int
    reset_at: int
    """Unix time at which the oldest counted request leaves the window."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response."""
        return {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(self.reset_at),
        }


class RateLimiter:
    """Counts requests. If counting fails, requests pass: Redis must not stop the service."""

    def __init__(self, per_minute: int, storage: Storage) -> None:
        self._per_minute = per_minute
        self._item = RateLimitItemPerMinute(max(1, per_minute))
        self._window = MovingWindowRateLimiter(storage)

    @classmethod
    def open(cls, settings: Settings) -> RateLimiter:
        """As the settings say. Raises ConfigurationError if the Redis URL is invalid or the Redis client is not installed."""
        if settings.redis_url is None:
            return cls(settings.rate_limit_per_minute, MemoryStorage())
        try:
            storage = storage_from_string(
                settings.redis_url.get_secret_value(), socket_connect_timeout=0.5, socket_timeout=0.5
            )
        except LimitsConfigurationError as error:
            raise ConfigurationError(
                "EMBEDD_REDIS_URL is not a Redis URL, or the Redis client is not installed.",
                resolution="Use redis://host:port/0, and install it with `pip install redis`.",
            ) from error
        return cls(settings.rate_limit_per_minute, storage)  # type: ignore[arg-type]

    def hit(self, key_id: str) -> tuple[RateLimit | None, RateLimitExceeded | None]:
        """Counts a request. Returns the state of its key (None: no limit), and the error to raise if it is over the limit."""
        if self._per_minute == 0:
            return None, None
        try:
            passes = self._window.hit(self._item, key_id)
            reset_at, remaining = self._window.get_window_stats(self._item, key_id)
        except Exception as error:  # noqa: BLE001 - the storage's client may raise anything
            _log.warning("rate limit not counted", kind=type(error).__name__)
            return None, None
        used = RateLimit(self._per_minute, max(0, remaining), int(reset_at))
        if passes:
            return used, None
        wait = min(max(reset_at - time.time(), 1.0), _WINDOW_SECONDS)
        return used, RateLimitExceeded(
            f"More than {self._per_minute} requests per minute with this key.", retry_after_seconds=wait
        )
