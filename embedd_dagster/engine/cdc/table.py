"""One vector table of a CDC consumer: brings the rows of changed keys into the live set."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from embedd_dagster.catalog import vector_sets
from embedd_dagster.catalog.cdc import CdcTableRow
from embedd_dagster.catalog.tables import VectorSetRow, VectorTable
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.origins import require_same_table
from embedd_dagster.engine.pipeline import RowPipeline
from embedd_dagster.engine.reconcile import write_keys
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.errors import SourceRejected, SourceTableNotFound
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import TableReader


class TableConsumer:
    """Applies changes to one vector table; used by one thread at a time."""

    def __init__(self, context: RunContext, row: CdcTableRow) -> None:
        self.id = row.table.id
        self.source = CdcTable(row.table.source_table, row.table.primary_key_column)
        self.interval_seconds = row.table.sync_interval_seconds
        self._context = context
        self._row = row
        self._reader: TableReader | None = None
        self._key_types: set[type] = set()
        """Of the keys that the reader was last asked for."""

    def serves(self, row: CdcTableRow) -> bool:
        """Whether this still fits the table as it is now; otherwise it must be replaced."""
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

    def reopen_reader(self) -> None:
        """Has the next rows read by a new reader, which knows the table as it is then."""
        self._reader = None

    def write(self, keys: Sequence[Key]) -> RowCounts:
        """Reads these rows again and writes them into the live set; rows that are gone are deleted. Idempotent.

        Raises what the source, the provider or the store raise; the error names a column or table that is gone.
        """
        live = self._row.live_set
        assert live is not None  # noqa: S101 - nothing is applied to a table without a live set
        key_types = {type(key) for key in keys}
        if key_types != self._key_types:  # a reader of the column's former type would not find the new keys' rows
            self.reopen_reader()
            self._key_types = key_types
        try:
            return self._write(live, keys)
        except (SourceTableNotFound, SourceRejected):
            # The cached reader is stale; reopen it to get a precise error, or to pick up a recreated table.
            self.reopen_reader()
            return self._write(live, keys)

    def _write(self, live: VectorSetRow, keys: Sequence[Key]) -> RowCounts:
        configuration = VectorConfiguration.from_json(live.configuration)
        if self._reader is None:
            reader = self._context.reader(configuration)
            require_same_table(reader, live, configuration.source_table)
            self._reader = reader
        vector_set = self._vector_set(live)
        embedder = self._context.resources.embedder(configuration, self._row.provider)
        # one memory per batch: a consumer runs for long, and a shared memory would only grow
        with closing(TextMemory()) as memory:
            pipeline = RowPipeline(
                self._context, vector_set, configuration, embedder, reuse_from=[vector_set], memory=memory
            )
            return write_keys(self._reader, pipeline, keys)

    def _vector_set(self, live: VectorSetRow) -> VectorSet:
        return vector_sets.as_vector_set(live, self._row.table.storage_name)

    def count_points(self) -> int:
        """How many rows have points in the live set. Not retried: a store that is down raises."""
        live = self._row.live_set
        return 0 if live is None else self._context.store.count(self._vector_set(live))
