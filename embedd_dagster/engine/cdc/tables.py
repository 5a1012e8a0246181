"""The tables of one CDC consumer: carries out what `core.cdc` decides, and makes durable what is left to be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Final

from sqlalchemy.orm import Session

from embedd_dagster.catalog import cdc, resyncs, vector_tables
from embedd_dagster.catalog.cdc import CdcTableRow
from embedd_dagster.core.cdc import ChangeAction, TableState, decide_action, may_have_missed
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.keys import Key
from embedd_dagster.engine.cdc.buffer import ChangeBuffer
from embedd_dagster.engine.cdc.lease import CdcLease, LogTooLong
from embedd_dagster.engine.cdc.report import CdcReports
from embedd_dagster.engine.cdc.table import TableConsumer
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.run import describe
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import (
    CatalogUnavailable,
    RunCancelled,
    RunSuperseded,
    SourceUnavailable,
    TransientError,
)
from embedd_dagster.protocols.cdc import CdcTable, ChangeBatch, TableFingerprint

_TABLES_AT_ONCE: Final = 4
_ERRORS_OF_ALL_TABLES: Final = (RunSuperseded, RunCancelled, LogTooLong, CatalogUnavailable)
"""Errors that do not concern one table alone: nothing is confirmed, and the changes are read again."""
_APPLIED: Final = (ChangeAction.APPLY, ChangeAction.APPLY_AND_BUFFER)
_BUFFERED: Final = (ChangeAction.BUFFER, ChangeAction.APPLY_AND_BUFFER)


class CdcTables:
    """The vector tables that one consumer keeps in sync. Used by one thread."""

    def __init__(
        self,
        runtime: Runtime,
        context: RunContext,
        lease: CdcLease,
        reports: CdcReports,
        buffer: ChangeBuffer | None = None,
    ) -> None:
        self._runtime = runtime
        self._context = context
        self._lease = lease
        self._reports = reports
        self._tables: dict[str, TableConsumer] = {}
        self._by_source: dict[CdcTable, list[str]] = {}
        self._fingerprints: dict[CdcTable, TableFingerprint | None] = {}
        self._buffer = ChangeBuffer() if buffer is None else buffer
        self._workers = ThreadPoolExecutor(_TABLES_AT_ONCE, thread_name_prefix="table")

    def close(self) -> None:
        """Returns when nothing is written any more."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    @property
    def by_id(self) -> Mapping[str, TableConsumer]:
        """The tables by the id of the vector table."""
        return self._tables

    @property
    def sources(self) -> Sequence[CdcTable]:
        """The source tables, each once."""
        return list(self._by_source)

    @property
    def fingerprints(self) -> Mapping[CdcTable, TableFingerprint | None]:
        """The recorded fingerprints of the source tables that were subscribed before."""
        return self._fingerprints

    def ids(self, sources: Iterable[CdcTable]) -> list[str]:
        """The vector tables that are made from these source tables."""
        return [key for source in sources for key in self._by_source.get(source, ())]

    @property
    def interval_seconds(self) -> float:
        """How long changes may be collected before they are read: 0 if a table wants them at once."""
        intervals = [table.interval_seconds for table in self._tables.values()]
        return min((seconds or 0 for seconds in intervals), default=0)

    def replace(self, rows: Iterable[CdcTableRow]) -> None:
        """Sets the tables to consume. For tables that have left with buffered changes, a resync is requested."""
        before, self._tables, self._by_source = self._tables, {}, {}
        fingerprints: dict[CdcTable, list[TableFingerprint | None]] = {}
        for row in rows:
            table = before.get(row.table.id)
            if table is None or not table.serves(row):
                table = TableConsumer(self._context, row)
            self._tables[table.id] = table
            self._by_source.setdefault(table.source, []).append(table.id)
            if row.table.cdc.subscribed_since is not None:
                fingerprints.setdefault(table.source, []).append(row.table.cdc.table_fingerprint)
        # if the vector tables of one source table disagree, it is subscribed again, so that all of them are compared
        self._fingerprints = {
            source: kept[0] for source, kept in fingerprints.items() if all(one == kept[0] for one in kept)
        }
        left = [key for key in self._buffer.tables() if key not in self._tables]
        if left:
            with self._lease.fenced() as session:
                resyncs.request(session, left, "It was paused while changes were waiting.")
                resyncs.record_buffered(session, dict.fromkeys(left, 0))
        for key in left:  # only after the commit: their position is confirmed, so the source does not send them again
            self._buffer.take(key)

    def apply(self, batch: ChangeBatch) -> None:
        """Applies or buffers the changes of a batch, or requests resyncs; durable when it returns. Idempotent."""
        self._resync_truncated(batch)
        self._resync_broken(batch)
        changed = {key: keys for source, keys in batch.keys.items() for key in self._by_source.get(source, ())}
        if changed:
            before = self._read_states(changed)
            actions = {key: decide_action(before.get(key)) for key in changed}
            self._carry_out(changed, actions, before, batch.committed_at)

    def apply_buffered(self) -> None:
        """Applies the buffered changes of tables whose task has ended."""
        buffered = self._buffer.tables()
        if not buffered:
            return
        before = self._read_states(buffered)
        for key in buffered:
            state = before.get(key)
            if state is not None and state.live_task is not None:
                continue
            keys = self._buffer.take(key)
            try:
                self._apply_taken(key, keys, before)
            except BaseException:
                # their position is confirmed, so the source does not send them again
                self._buffer.put_back(key, keys)
                raise

    def _read_states(self, keys: Iterable[str]) -> dict[str, TableState]:
        with self._runtime.catalog.transaction() as session:
            return cdc.table_states(session, list(keys))

    def _apply_taken(self, key: str, keys: list[Key] | None, before: Mapping[str, TableState]) -> None:
        """Applies the keys of a table, buffers them again or requests a resync; `keys` is None after an overflow."""
        action = decide_action(before.get(key))
        if keys is None or action is ChangeAction.RESYNC:
            self._request_resync([key], "Its changes could not be followed.")
        elif action is not ChangeAction.APPLY or self._carry_out({key: keys}, {key: action}, before, None):
            self._complete_buffered(key)

    def _carry_out(
        self,
        changed: Mapping[str, list[Key]],
        actions: Mapping[str, ChangeAction],
        before: Mapping[str, TableState],
        committed_at: datetime | None,
    ) -> bool:
        """Writes what can be applied, then makes durable what is left to be done; returns whether nothing is."""
        wanted = {key for key, action in actions.items() if action in _APPLIED}
        counts, failed = self._write({key: changed[key] for key in wanted}, before)
        with self._lease.fenced() as session:
            after = cdc.table_states(session, changed)
            again = {
                key
                for key, action in actions.items()
                if action in _BUFFERED or may_have_missed(before.get(key), after.get(key))
            } - failed.keys()
            buffered = {key for key in again if key in self._tables and self._buffer.add(key, changed[key])}
            to_resync = (again - buffered) | {key for key, action in actions.items() if action is ChangeAction.RESYNC}
            to_resync |= wanted - counts.keys() - failed.keys() - buffered  # paused in the moment of a swap
            resyncs.request(session, buffered, "A task was at work.", buffered_by=self._lease.run_id)
            resyncs.request(session, to_resync, "Its changes could not be followed.")
            resyncs.request(session, failed, "Its changes could not be applied.")
            left = buffered | to_resync | failed.keys()
            resyncs.record_buffered(session, {key: self._buffer.count(key) for key in left})
            for key, error in failed.items():
                self._record_error(session, key, error)
        lag = None if committed_at is None else (datetime.now(UTC) - committed_at).total_seconds()
        for key, count in counts.items():
            self._reports.add(key, count, len(changed[key]), lag)
        return not left

    def _write(
        self, wanted: Mapping[str, list[Key]], before: Mapping[str, TableState]
    ) -> tuple[dict[str, RowCounts], dict[str, Exception]]:
        """Writes keys of several tables at once: returns their counts, and the errors of the tables that failed."""
        if any(key not in self._tables or self._tables[key].version != before[key].live_version for key in wanted):
            with self._runtime.catalog.transaction() as session:  # another version was swapped in meanwhile
                rows = cdc.cdc_tables(session, self._lease.connection_id)
            self.replace(rows)
        futures: dict[str, Future[RowCounts]] = {
            key: self._workers.submit(self._tables[key].write, keys)
            for key, keys in wanted.items()
            if key in self._tables  # otherwise it was just paused or deleted
        }
        wait(futures.values())
        counts, failed = dict[str, RowCounts](), dict[str, Exception]()
        for key, future in futures.items():
            try:
                counts[key] = future.result()
            except SourceUnavailable as error:
                # if the source answers, only this table cannot be read: it is locked by VACUUM FULL or ALTER TABLE
                self._context.source.check()
                failed[key] = error
            except _ERRORS_OF_ALL_TABLES:
                raise
            except Exception as error:  # noqa: BLE001 - one table must not stop the others; it gets a resync
                failed[key] = error
        return counts, failed

    def _complete_buffered(self, key: str) -> None:
        with self._lease.fenced() as session:
            resyncs.clear_buffered(session, key, self._lease.run_id)

    def _record_error(self, session: Session, key: str, error: Exception) -> None:
        message = describe(error)
        self._context.log(f"{key}: {message}")
        if isinstance(error, TransientError):
            vector_tables.record_error(session, [key], message)
        else:
            vector_tables.mark_failed(session, key, message)

    def _resync_truncated(self, batch: ChangeBatch) -> None:
        truncated = self.ids(batch.truncated)
        if truncated:
            # the log says so: the source does not only look emptied
            self._request_resync(truncated, "The source table was emptied by TRUNCATE.", confirm_mass_delete=True)

    def _resync_broken(self, batch: ChangeBatch) -> None:
        for source, error in batch.broken.items():
            keys = self.ids([source])
            self._request_resync(keys, error.message)
            with self._lease.fenced() as session:
                for key in keys:
                    vector_tables.mark_failed(session, key, describe(error))

    def _request_resync(self, keys: Sequence[str], reason: str, **options: bool) -> None:
        self._context.log(f"{', '.join(sorted(keys))}: {reason} A sync compares it.")
        with self._lease.fenced() as session:
            resyncs.request(session, keys, reason, options=options)
            resyncs.record_buffered(session, dict.fromkeys(keys, 0))
