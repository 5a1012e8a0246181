"""What a source database must be able to do: introspect tables, read rows in key order, and report changes.

A source is opened by `sources.open_source` and may be used by several threads. It raises only: SourceUnavailable (try
again), SourceAccessDenied, SourceTableNotFound, SourceRejected. A read that fails raises in the middle of its
iteration: it never looks like the end of the table. No statement stays open while a caller works on what it gave, except
`fingerprints`, which may be one scan that lasts as long as its iteration. A source is given a `DeadlineSource` when it is
opened; every wait for its server ends by that deadline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self

from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import Fingerprint, SourceRow, TableDigest
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.protocols.cdc import CdcStream, CdcTable

PAGE_BYTES: Final = 4 * 2**20
"""Of a page as the engine asks for it: what a reader holds of a table of wide rows."""


@dataclass(frozen=True, slots=True)
class SourceColumn:
    """A column as the source describes it; `filter_types` are those whose values it can hold."""

    name: str
    type: str
    nullable: bool
    filter_types: frozenset[FilterType]
    is_key_type: bool
    """Whether a primary key of this type can be carried (integers, text, uuid, numeric, dates)."""


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A table or view as the source describes it. `name` is how `source_table` may spell it."""

    name: str
    columns: tuple[SourceColumn, ...]
    is_view: bool
    row_estimate: int | None

    def column(self, name: str) -> SourceColumn | None:
        """The column of this name, or None."""
        return next((column for column in self.columns if column.name == name), None)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is read of a table: the column that identifies its rows, and other columns."""

    table: str
    primary_key_column: str
    columns: tuple[str, ...]
    filter_types: Mapping[str, FilterType] = field(default_factory=dict)
    """The types to store metadata columns as. A column whose type no longer fits is rejected."""


class TableReader(Protocol):
    """One selection of one source, resolved against the database once. Safe to use from several threads."""

    key_type: str
    """The source's own type name of the primary key, good in its DDL."""
    origin: dict[str, Any]
    """Which table the name led to: `name`, qualified and good in a message, and `oid`, which outlives a rename."""

    def count(self) -> int:
        """The number of rows, exactly."""
        ...

    def check_keys(self) -> None:
        """Returns when no two rows have one key, by constraint or by counting. Raises SourceRejected, naming such a key."""
        ...

    def split(self, shard_count: int) -> list[KeyRange]:
        """At most `shard_count` ranges of about equal size that together cover every possible key."""
        ...

    def read(self, key_range: KeyRange, *, page_rows: int, page_bytes: int) -> Iterator[list[SourceRow]]:
        """The rows of a range in key order, in pages of at most `page_rows` rows and some `page_bytes` bytes.

        No transaction is open between two pages. Rows that change during the read are seen before or after their change.
        """
        ...

    def read_keys(self, keys: Sequence[Key], *, page_bytes: int) -> Iterator[list[SourceRow]]:
        """The rows of these keys, in any order, in pages of some `page_bytes` bytes; keys without a row are left out.

        All of them are read when this returns: what it gives may be iterated without another error of the source.
        """
        ...

    def digest(self, bits: int) -> TableDigest:
        """The digest of the whole table over 2^bits buckets, in one aggregate query."""
        ...

    def fingerprints(self, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every row whose `bits`-bit bucket is among `buckets` (None: of every row)."""
        ...


class Source(Protocol):
    """A connection to somebody's database."""

    def check(self) -> None:
        """Returns when the database answers to these credentials."""
        ...

    def tables(self, limit: int) -> list[SourceTable]:
        """Up to `limit` tables and views that may be read, without system ones, by name; columns are left empty."""
        ...

    def describe(self, table: str) -> SourceTable:
        """The table's columns. Raises SourceTableNotFound, SourceAccessDenied."""
        ...

    def check_key(self, table: str, column: str) -> None:
        """Returns when the column is unique and not null, by constraint or by its rows.

        Raises SourceRejected with a message that says why it is not a key.
        """
        ...

    def check_cdc_eligible(self, table: CdcTable) -> None:
        """Returns when CDC is possible for the table.

        Raises SourceRejected, whose resolution holds the exact statements that would make it so, SourceTableNotFound and
        SourceAccessDenied. Changes nothing.
        """
        ...

    def cdc_stream(self, name: str) -> CdcStream:
        """The CDC stream of this name, `[a-z0-9_]{1,50}`, which names what it creates in the source. Connects when used."""
        ...

    def reader(self, selection: Selection) -> TableReader:
        """A reader of the selection. Raises SourceTableNotFound, naming the table or the columns."""
        ...

    def close(self) -> None:
        """Closes connections. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
