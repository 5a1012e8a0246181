"""Strict mode of a collection: what the real server refuses when it is on, with its status codes and its words.

Source: `lib/collection/src/operations/verification` and `lib/common/rate_limiting` of Qdrant, and their tests over REST.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from embedd_dagster.stack.qdrant.wire import RefusedError

_CLAUSES = ("must", "should", "must_not")
_SECONDS_PER_MINUTE = 60.0


class RateLimitedError(RefusedError):
    """A 429; `retry_after_seconds` is None if the request would never be allowed."""

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(429, f"Rate limiting exceeded: {message}")
        self.retry_after_seconds = retry_after_seconds


class RateLimiter:
    """Tokens of a minute, refilled as it passes; full at the start."""

    def __init__(self, kind: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._kind = kind
        self._clock = clock
        self._per_minute = 0
        self._tokens = 0.0
        self._filled_at = 0.0

    def take(self, tokens: int, per_minute: int | None) -> None:
        """Takes the tokens of one request, or refuses it."""
        if per_minute is None:
            return
        now = self._clock()
        if per_minute != self._per_minute:
            self._per_minute, self._tokens, self._filled_at = per_minute, float(per_minute), now
        if tokens > per_minute:
            raise RateLimitedError(
                f"{self._kind} rate limit exceeded, request larger than rate limiter capacity, "
                "please try to split your request"
            )
        refilled = self._tokens + (now - self._filled_at) * per_minute / _SECONDS_PER_MINUTE
        self._tokens, self._filled_at = min(float(per_minute), refilled), now
        if self._tokens < tokens:
            wait = math.ceil((tokens - self._tokens) * _SECONDS_PER_MINUTE / per_minute)
            raise RateLimitedError(
                f"{self._kind} rate limit exceeded: Operation requires {tokens} tokens but only {self._tokens:.1f} were "
                f"available. Retry after {wait}s",
                wait,
            )
        self._tokens -= tokens


class StrictMode:
    """The checks of one collection. `config` is its `strict_mode_config`; nothing is refused unless that is enabled."""

    def __init__(self) -> None:
        self._reads = RateLimiter("Read")
        self._writes = RateLimiter("Write")
        self.config: Mapping[str, Any] = {}

    def check_read(self, body: Mapping[str, Any], indexed: Callable[[], set[str]], *, limit: int | None = None) -> None:
        """A query, scroll or count by this body; `indexed` names the fields that have a payload index."""
        if not (config := self._enabled()):
            return
        conditions = [*_conditions(body.get("filter"))]
        self._reads.take(max(1, len(conditions)), config.get("read_rate_limit"))
        _check_limit("limit", limit, config.get("max_query_limit"))
        params = body.get("params") or {}
        _check_limit("hnsw_ef", params.get("hnsw_ef"), config.get("search_max_hnsw_ef"))
        if config.get("search_allow_exact") is False and (params.get("exact") or body.get("exact")):
            raise _refused("Exact search is disabled", 'Set "exact" to false.')
        self._check_conditions(conditions)
        if config.get("unindexed_filtering_retrieve") is False:
            _check_indexed(conditions, indexed())

    def check_ids_read(self, count: int) -> None:
        """Reading this many points by their ids."""
        self._reads.take(max(1, count), self._enabled().get("read_rate_limit"))

    def check_upsert(self, count: int) -> None:
        """Writing this many points."""
        config = self._enabled()
        _check_limit("upsert", count, config.get("upsert_max_batchsize"))
        self._writes.take(max(1, count), config.get("write_rate_limit"))

    def check_write(self, count: int) -> None:
        """Another write, that names this many points."""
        self._writes.take(max(1, count), self._enabled().get("write_rate_limit"))

    def check_index(self, present: int) -> None:
        """One more payload index."""
        most = self._enabled().get("max_payload_index_count")
        if most is not None and present >= most:
            raise _refused(
                f'Limit exceeded {present + 1} > {most} for "max_payload_index_count"',
                "Delete an index that is not needed.",
            )

    def _enabled(self) -> Mapping[str, Any]:
        return self.config if self.config.get("enabled") else {}

    def _check_conditions(self, conditions: list[Mapping[str, Any]]) -> None:
        most, longest = self.config.get("filter_max_conditions"), self.config.get("condition_max_size")
        if most is not None and len(conditions) > most:
            raise _refused(
                f"Filter condition limit exceeded {len(conditions)} > {most}", "Reduce the conditions of the filter."
            )
        for condition in conditions:
            size = len(condition.get("match", {}).get("any", ()))
            if longest is not None and size > longest:
                raise _refused(
                    f"Condition size limit exceeded {size} > {longest}", "Reduce the values of the condition."
                )


def _conditions(where: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(where, dict):
        return
    if not where.keys() & set(_CLAUSES):
        if where:
            yield where
        return
    for clause in _CLAUSES:
        parts = where.get(clause) or []
        for part in parts if isinstance(parts, list) else [parts]:
            yield from _conditions(part)


def _check_limit(name: str, given: int | None, most: int | None) -> None:
    if given is not None and most is not None and given > most:
        raise _refused(
            f'Limit exceeded {given} > {most} for "{name}"', f'Reduce the "{name}" parameter to or below {most}.'
        )


def _check_indexed(conditions: list[Mapping[str, Any]], indexed: set[str]) -> None:
    for condition in conditions:
        key = condition.get("key") or condition.get("is_empty", {}).get("key")
        # Edge names the fields of its indexes without the quotes of their paths
        if key is not None and key.replace('"', "") not in indexed:
            raise _refused(
                f'Index required but not found for "{key}" of one of the following types: [keyword]',
                "Create an index for this key or use a different filter.",
            )


def _refused(problem: str, help_text: str) -> RefusedError:
    return RefusedError(400, f"Bad request: {problem}. Help: {help_text}")
