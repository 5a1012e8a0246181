"""Reads from the headers of a refusal when to try again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_LONGEST_DURATION = 64
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float | None:
    """Seconds of `120ms`, `1s`, `6m0s`, `1h2m3.5s` or a bare number; None for anything else."""
    text = text.strip()
    if len(text) > _LONGEST_DURATION:  # the pattern takes quadratic time
        return None
    try:
        seconds = float(text)
    except ValueError:
        parts = _DURATION_PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            return None
        seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    return seconds if 0 <= seconds < float("inf") else None


def retry_after_seconds(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Seconds that the provider asks to wait, or None if it does not say. `headers` ignores case, as httpx's do.

    `retry-after-ms` goes before `Retry-After` (seconds or an HTTP date), and that before `x-ratelimit-reset-*`. Of the
    latter, those of exhausted limits count.
    """
    milliseconds = parse_duration(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    if value := headers.get("retry-after"):
        seconds = parse_duration(value)
        return seconds if seconds is not None else _seconds_until(value, now or datetime.now(UTC))
    resets = {}
    for kind in ("requests", "tokens"):
        seconds = parse_duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
        if seconds is not None:
            resets[kind] = seconds
    used_up = [seconds for kind, seconds in resets.items() if headers.get(f"x-ratelimit-remaining-{kind}") == "0"]
    if used_up:
        return max(used_up)
    # tokens are left, but fewer than requested: the earlier reset is worth a try
    return min(resets.values(), default=None)


def _seconds_until(http_date: str, now: datetime) -> float | None:
    try:
        instant = parsedate_to_datetime(http_date)
    except (ValueError, OverflowError):
        return None
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return max(0.0, (instant - now).total_seconds())
