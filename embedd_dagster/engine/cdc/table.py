"""One vector table as a follower sees it: brings the rows of changed keys into the set that is live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.orm import Session

from embedd_dagster.catalog import failed_rows, vector_sets
from embedd_dagster.catalog.cdc import CdcTableRow
from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.catalog.tables import VectorSetRow, VectorTable
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.opened import Opened
from embedd_dagster.engine.origins import require_same_table
from embedd_dagster.engine.pipeline import RowCounts
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.engine.sync import write_keys
from embedd_dagster.errors import SourceRejected, SourceTableNotFound
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import TableReader
from embedd_dagster.protocols.store import Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Following:
    """What the tables of one follower have in common."""

    opened: Opened
    fenced: Callable[[], AbstractContextManager[Session]]
    check: Callable[[], None]
    log: Callable[[str], None]


class TableFollower:
    """Applies changes to one vector table; used by one thread at a time."""

    def __init__(self, following: Following, row: CdcTableRow) -> None:
        self.id = row.table.id
        self.source = CdcTable(row.table.source_table, row.table.primary_key_column)
        self.interval_seconds = row.table.sync_interval_seconds
        self._following = following
        self._row = row
        self._reader: TableReader | None = None
        self._key_types: set[type] = set()
        """Of the keys that the reader was last asked for."""

    def takes_over(self, row: CdcTableRow) -> bool:
        """Whether this goes on serving the table as it is now; else it is to be made anew."""
        mine, table = self._row, row.table
        return (
            (mine.live_set and mine.live_set.version) == (row.live_set and row.live_set.version)
            and (mine.provider and mine.provider.updated_at) == (row.provider and row.provider.updated_at)
            and mine.table.sync_interval_seconds == table.sync_interval_seconds
            and mine.table.name == table.name
        )

    @property
    def row(self) -> VectorTable:
        """The vector table as it was when this was made."""
        return self._row.table

    @property
    def version(self) -> int | None:
        """The version of the set that it writes to."""
        return self._row.live_set.version if self._row.live_set else None

    @property
    def store(self) -> Store:
        """Where the points are."""
        return self._following.opened.store

    def check(self) -> None:
        """Returns while following may go on."""
        self._following.check()

    def patiently(self, action: Callable[[], T]) -> T:
        """The result of an idempotent action, waited for while the outside system is down."""
        return self._following.opened.patiently(action)

    def as_owner(self, write: Callable[[], T]) -> T:
        """The result of an idempotent write to the store, done only while this run follows the connection."""
        return self._following.opened.as_owner(write)

    def record(self, action: Callable[[Session], T]) -> T:
        """Does an action in a catalog transaction that commits only while this run follows the connection."""
        with self._following.fenced() as session:
            return action(session)

    def record_failures(self, session: Session, vector_set: VectorSet, failures: list[RowFailure]) -> None:
        """Keeps failed rows, and says so in the log."""
        if failures:
            failed_rows.record(session, vector_set, failures)
            self._following.log(f"{self.id}: {len(failures)} rows failed: {failures[0].code}.")

    def forget_reader(self) -> None:
        """The next rows are read by what the table is like then."""
        self._reader = None

    def write(self, keys: Sequence[Key]) -> RowCounts:
        """Reads these rows again and writes them into the live set; those that are gone are deleted. Idempotent.

        Raises what the source, the provider or the store raise; a column or table that is gone is named.
        """
        live = self._row.live_set
        assert live is not None  # noqa: S101 - nothing is applied to a table without a live set
        key_types = {type(key) for key in keys}
        if key_types != self._key_types:  # a reader of the column's former type would take the new keys for gone
            self.forget_reader()
            self._key_types = key_types
        try:
            return self._write(live, keys)
        except (SourceTableNotFound, SourceRejected):
            # the reader knows the table as it was; asked anew, it names what is missing, or the table was made anew
            self.forget_reader()
            return self._write(live, keys)

    def _write(self, live: VectorSetRow, keys: Sequence[Key]) -> RowCounts:
        configuration = VectorConfiguration.from_json(live.configuration)
        opened = self._following.opened
        if self._reader is None:
            reader = opened.reader(configuration)
            require_same_table(reader, live, configuration.source_table)
            self._reader = reader
        vector_set = self.vector_set(live)
        # the texts of one batch: a follower lives long, what it remembered of earlier ones would only grow
        with closing(TextMemory()) as memory:
            pipeline = opened.pipeline(
                vector_set, configuration, self._row.provider, reuse_from=[vector_set], memory=memory
            )
            return write_keys(self, self._reader, pipeline, vector_set, keys)

    def vector_set(self, live: VectorSetRow) -> VectorSet:
        """What the store must know of the live set."""
        return vector_sets.as_vector_set(live, self._row.table.storage_name)

    def count_points(self) -> int:
        """How many points the live set has; a store that is down is not waited for."""
        live = self._row.live_set
        return 0 if live is None else self.store.count(self.vector_set(live))
