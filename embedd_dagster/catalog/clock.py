"""The present instant, and fresh ids at it."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from embedd_dagster.core import ids


def now() -> datetime:
    """The present instant in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A new id, see `core.ids`."""
    return ids.new_id(prefix, int(time.time()))
