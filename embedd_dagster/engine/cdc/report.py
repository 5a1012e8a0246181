"""What following did to each vector table, told at a modest rate: not one report a change."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedd_dagster.catalog import failed_rows, vector_tables
from embedd_dagster.engine.pipeline import RowCounts
from embedd_dagster.errors import PermanentError, TransientError

if TYPE_CHECKING:
    from embedd_dagster.engine.cdc.lease import FeedLease
    from embedd_dagster.engine.cdc.table import TableFollower

_SECONDS_BETWEEN: Final = 60.0


@dataclass(frozen=True, slots=True)
class FollowReport:
    """What was applied to one vector table since its last report."""

    vector_table_id: str
    partition_key: str
    name: str
    source_table: str
    storage_name: str
    platform_vector_ref: str | None
    model: str
    version: int
    changes: int
    """Changed keys; several changes of one row within a batch are one."""
    counts: RowCounts
    seconds: float
    lag_seconds: float
    """The longest time from a commit in the source until it could be found."""
    lag_bytes: int | None
    point_count: int


@dataclass(slots=True)
class _Sum:
    since: float = field(default_factory=time.monotonic)
    changes: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    lag_seconds: float = 0.0


class Reports:
    """Adds up what is applied, and tells it at most once a minute and table."""

    def __init__(self, send: Callable[[FollowReport], None]) -> None:
        self._send = send
        self._sums: dict[str, _Sum] = {}
        self._sent_at: dict[str, float] = {}

    def add(self, vector_table_id: str, counts: RowCounts, changes: int, lag_seconds: float | None) -> None:
        """Something was applied."""
        total = self._sums.setdefault(vector_table_id, _Sum())
        total.counts.add(counts)
        total.changes += changes
        total.lag_seconds = max(total.lag_seconds, lag_seconds or 0.0)

    def send_due(self, tables: Mapping[str, TableFollower], lease: FeedLease, *, everything: bool = False) -> None:
        """Tells what is due, and keeps the counts that users see; `everything` at the end of a run."""
        instant = time.monotonic()
        for key in list(self._sums):
            if not everything and instant - self._sent_at.get(key, -_SECONDS_BETWEEN) < _SECONDS_BETWEEN:
                continue
            table = tables.get(key)
            if table is None or table.version is None:
                del self._sums[key]
                continue
            self._sent_at[key] = instant
            try:
                point_count = table.count_points()
                with lease.fenced() as session:
                    failed = failed_rows.count(session, key, table.version)
                    truncated = self._sums[key].counts.truncated
                    vector_tables.record_counts(session, key, table.version, point_count, failed, truncated)
            except (TransientError, PermanentError):
                continue  # numbers for people: told in a minute, with what is added until then
            total = self._sums.pop(key)
            self._send(
                FollowReport(
                    vector_table_id=key,
                    partition_key=table.row.partition_key,
                    name=table.row.name,
                    source_table=table.row.source_table,
                    storage_name=table.row.storage_name,
                    platform_vector_ref=table.row.platform_vector_ref,
                    model=table.row.embedding_model,
                    version=table.version,
                    changes=total.changes,
                    counts=total.counts,
                    seconds=instant - total.since,
                    lag_seconds=total.lag_seconds,
                    lag_bytes=lease.lag_bytes,
                    point_count=point_count,
                )
            )
