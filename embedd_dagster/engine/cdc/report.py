"""What a CDC consumer applied to each vector table, reported at most once per minute and table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from embedd_dagster.catalog import failed_rows, vector_tables
from embedd_dagster.core.counts import ReportedCounts, RowCounts
from embedd_dagster.engine.cdc.lease import CdcLease
from embedd_dagster.engine.cdc.table import TableConsumer
from embedd_dagster.errors import PermanentError, TransientError

_SECONDS_BETWEEN: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CdcReport(ReportedCounts):
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
    seconds: float
    lag_seconds: float
    """The longest time from a commit in the source until it could be found."""
    lag_bytes: int | None
    point_count: int


@dataclass(slots=True)
class _Sum:
    since: float
    changes: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    lag_seconds: float = 0.0


class CdcReports:
    """Adds up what is applied, and reports it at most once per minute and table."""

    def __init__(self, send: Callable[[CdcReport], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._sums: dict[str, _Sum] = {}
        self._sent_at: dict[str, float] = {}

    def add(self, vector_table_id: str, counts: RowCounts, changes: int, lag_seconds: float | None) -> None:
        """Adds what was applied to a table."""
        total = self._sums.setdefault(vector_table_id, _Sum(self._clock()))
        total.counts.add(counts)
        total.changes += changes
        total.lag_seconds = max(total.lag_seconds, lag_seconds or 0.0)

    def send_due(self, tables: Mapping[str, TableConsumer], lease: CdcLease, *, everything: bool = False) -> None:
        """Sends the reports that are due (`everything`: all), and updates the counts that users see.

        Raises RunSuperseded. If a count cannot be read, the report is sent a minute later.
        """
        instant = self._clock()
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
                continue
            total = self._sums.pop(key)
            self._send(
                CdcReport(
                    **total.counts.reported(rewrites=True),
                    vector_table_id=key,
                    partition_key=table.row.partition_key,
                    name=table.row.name,
                    source_table=table.row.source_table,
                    storage_name=table.row.storage_name,
                    platform_vector_ref=table.row.platform_vector_ref,
                    model=table.row.embedding_model,
                    version=table.version,
                    changes=total.changes,
                    seconds=instant - total.since,
                    lag_seconds=total.lag_seconds,
                    lag_bytes=lease.lag_bytes,
                    point_count=point_count,
                )
            )
