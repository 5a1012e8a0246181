"""The tables of one follower: what becomes of the changes to them, by what each vector table is at that moment.

`core.following` has the rules; here they are carried out, and what is left to be done is made durable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from typing import Final

from sqlalchemy.orm import Session

from embedd_dagster.catalog import cdc, resyncs, vector_tables
from embedd_dagster.catalog.cdc import CdcTableRow
from embedd_dagster.core.cdc import TableState, Treatment, may_have_missed, treatment
from embedd_dagster.core.keys import Key
from embedd_dagster.engine.cdc.buffer import NotedKeys
from embedd_dagster.engine.cdc.lease import FeedLease, LogTooLong
from embedd_dagster.engine.cdc.report import Reports
from embedd_dagster.engine.cdc.table import Following, TableFollower
from embedd_dagster.engine.pipeline import RowCounts
from embedd_dagster.engine.run import describe
from embedd_dagster.errors import (
    CatalogUnavailable,
    RunCancelled,
    RunSuperseded,
    SourceUnavailable,
    TransientError,
)
from embedd_dagster.protocols.cdc import CdcTable, ChangeBatch, TableFingerprint

_TABLES_AT_ONCE: Final = 4
_OF_ALL_TABLES: Final = (RunSuperseded, RunCancelled, LogTooLong, CatalogUnavailable)
"""What does not concern one table alone: nothing is confirmed, and everything is read again."""


class CdcTables:
    """The vector tables that one follower keeps true. Used by one thread."""

    def __init__(self, following: Following, lease: FeedLease, reports: Reports) -> None:
        self._following = following
        self._lease = lease
        self._reports = reports
        self._tables: dict[str, TableFollower] = {}
        self._by_source: dict[CdcTable, list[str]] = {}
        self._shapes: dict[CdcTable, TableFingerprint | None] = {}
        self._noted = NotedKeys()
        self._workers = ThreadPoolExecutor(_TABLES_AT_ONCE, thread_name_prefix="table")

    def close(self) -> None:
        """Waits until nothing is written any more."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    @property
    def by_id(self) -> Mapping[str, TableFollower]:
        """The tables, by vector table."""
        return self._tables

    @property
    def sources(self) -> Sequence[CdcTable]:
        """The source tables, each once."""
        return list(self._by_source)

    @property
    def shapes(self) -> Mapping[CdcTable, TableFingerprint | None]:
        """Of the source tables that were followed until now, as last kept."""
        return self._shapes

    def ids(self, sources: Iterable[CdcTable]) -> list[str]:
        """The vector tables that are made from these."""
        return [key for source in sources for key in self._by_source.get(source, ())]

    @property
    def gathering_seconds(self) -> float:
        """For how long changes may be gathered before they are read: 0 where a table wants them at once."""
        intervals = [table.interval_seconds for table in self._tables.values()]
        return min((seconds or 0 for seconds in intervals), default=0)

    def take_up(self, rows: Iterable[CdcTableRow]) -> None:
        """From now on these are followed; what was noted of others is owed to them."""
        before, self._tables, self._by_source = self._tables, {}, {}
        shapes: dict[CdcTable, list[TableFingerprint | None]] = {}
        for row in rows:
            table = before.get(row.table.id)
            if table is None or not table.takes_over(row):
                table = TableFollower(self._following, row)
            self._tables[table.id] = table
            self._by_source.setdefault(table.source, []).append(table.id)
            if row.table.cdc.subscribed_since is not None:
                shapes.setdefault(table.source, []).append(row.table.cdc.table_fingerprint)
        # where vector tables of one source do not agree, it is to join again: so all of them are compared
        self._shapes = {source: kept[0] for source, kept in shapes.items() if all(one == kept[0] for one in kept)}
        left = [key for key in self._noted.tables() if key not in self._tables]
        if left:
            with self._lease.fenced() as session:
                resyncs.request(session, left, "It was paused while changes were waiting.")
                resyncs.record_buffered(session, dict.fromkeys(left, 0))
        for key in left:  # only now: their position is confirmed, so nobody tells them again
            self._noted.take(key)

    def apply(self, batch: ChangeBatch) -> None:
        """Applies, notes or owes what is in the batch; durable when it returns. Idempotent."""
        self._owe_emptied(batch)
        self._refuse_broken(batch)
        changed = {key: keys for source, keys in batch.keys.items() for key in self._by_source.get(source, ())}
        if changed:
            with self._lease.transaction() as session:
                before = cdc.table_states(session, changed)
            self._treat(changed, {key: treatment(before.get(key)) for key in changed}, before, batch.committed_at)

    def apply_noted(self) -> None:
        """Applies what was noted of tables on which no task is at work any more."""
        noted = self._noted.tables()
        if not noted:
            return
        with self._lease.transaction() as session:
            before = cdc.table_states(session, noted)
        for key in noted:
            state = before.get(key)
            if state is not None and state.live_task is not None:
                continue
            keys = self._noted.take(key)
            try:
                self._work_off(key, keys, before)
            except BaseException:
                self._noted.put_back(key, keys)  # their position is confirmed, so nobody tells them again
                raise

    def _work_off(self, key: str, keys: list[Key] | None, before: Mapping[str, TableState]) -> None:
        """Applies, notes again or owes what was noted of a table, None where that was too much."""
        chosen = treatment(before.get(key))
        if keys is None or chosen is Treatment.OWE:
            self._owe([key], "Its changes could not be followed.")
        elif chosen is not Treatment.APPLY or self._treat({key: keys}, {key: chosen}, before, None):
            self._settle(key)

    def _treat(
        self,
        changed: Mapping[str, list[Key]],
        treatments: Mapping[str, Treatment],
        before: Mapping[str, TableState],
        committed_at: datetime | None,
    ) -> bool:
        """Writes what is to be applied, then makes durable what is still to be done; whether nothing is."""
        wanted = {key for key, chosen in treatments.items() if chosen in (Treatment.APPLY, Treatment.APPLY_AND_NOTE)}
        counts, failed = self._write({key: changed[key] for key in wanted}, before)
        with self._lease.fenced() as session:
            after = cdc.table_states(session, changed)
            again = {
                key
                for key, chosen in treatments.items()
                if chosen in (Treatment.NOTE, Treatment.APPLY_AND_NOTE)
                or may_have_missed(before.get(key), after.get(key))
            } - failed.keys()
            noted = {key for key in again if key in self._tables and self._noted.add(key, changed[key])}
            owed = (again - noted) | {key for key, chosen in treatments.items() if chosen is Treatment.OWE}
            owed |= wanted - counts.keys() - failed.keys() - noted  # paused in the moment of a swap
            resyncs.request(session, noted, "A task was at work.", buffered_by=self._lease.run_id)
            resyncs.request(session, owed, "Its changes could not be followed.")
            resyncs.request(session, failed, "Its changes could not be applied.")
            resyncs.record_buffered(session, {key: self._noted.count(key) for key in noted | owed | failed.keys()})
            for key, error in failed.items():
                self._note_error(session, key, error)
        lag = None if committed_at is None else (datetime.now(UTC) - committed_at).total_seconds()
        for key, count in counts.items():
            self._reports.add(key, count, len(changed[key]), lag)
        return not (noted or owed or failed)

    def _write(
        self, wanted: Mapping[str, list[Key]], before: Mapping[str, TableState]
    ) -> tuple[dict[str, RowCounts], dict[str, Exception]]:
        """Writes keys of several tables at once: what became of them, and the errors of those that failed."""
        if any(key not in self._tables or self._tables[key].version != before[key].live_version for key in wanted):
            with self._lease.transaction() as session:  # a swap since they were taken up
                rows = cdc.cdc_tables(session, self._lease.connection_id)
            self.take_up(rows)
        futures: dict[str, Future[RowCounts]] = {
            key: self._workers.submit(self._tables[key].write, keys)
            for key, keys in wanted.items()
            if key in self._tables  # else it was paused or deleted just now
        }
        wait(futures.values())
        counts, failed = dict[str, RowCounts](), dict[str, Exception]()
        for key, future in futures.items():
            try:
                counts[key] = future.result()
            except SourceUnavailable as error:
                # where it answers, it is only this table that cannot be read: behind a VACUUM FULL, an ALTER TABLE
                self._following.opened.source.check()
                failed[key] = error
            except _OF_ALL_TABLES:
                raise
            except Exception as error:  # noqa: BLE001 - one table must not stop the others; it is told, and owed a sync
                failed[key] = error
        return counts, failed

    def _note_error(self, session: Session, key: str, error: Exception) -> None:
        told = describe(error)
        self._following.log(f"{key}: {told}")
        if isinstance(error, TransientError):
            vector_tables.record_error(session, [key], told)
        else:
            vector_tables.mark_failed(session, key, told)

    def _owe_emptied(self, batch: ChangeBatch) -> None:
        emptied = self.ids(batch.truncated)
        if emptied:
            # the log says so: this is no source that only looks emptied
            self._owe(emptied, "The source table was emptied by TRUNCATE.", confirm_mass_delete=True)

    def _refuse_broken(self, batch: ChangeBatch) -> None:
        for source, error in batch.broken.items():
            keys = self.ids([source])
            self._owe(keys, error.message)
            with self._lease.fenced() as session:
                for key in keys:
                    vector_tables.mark_failed(session, key, describe(error))

    def _owe(self, keys: Sequence[str], reason: str, **options: bool) -> None:
        self._following.log(f"{', '.join(sorted(keys))}: {reason} A sync compares it.")
        with self._lease.fenced() as session:
            resyncs.request(session, keys, reason, options=options)
            resyncs.record_buffered(session, dict.fromkeys(keys, 0))

    def _settle(self, key: str) -> None:
        with self._lease.fenced() as session:
            resyncs.clear_buffered(session, key, self._lease.run_id)
