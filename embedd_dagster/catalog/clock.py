"""The present instant, and fresh ids at it."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from embedd_dagster.core import ids


def now() -> datetime:
    """The present instant in UTC."""
    return datetime.now(UTC)


def database_now(session: Session) -> datetime:
    """The present instant by the catalog's clock, which heartbeats are written by."""
    instant: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return instant


def new_id(prefix: str) -> str:
    """A new id, see `core.ids`."""
    return ids.new_id(prefix, int(time.time()))
