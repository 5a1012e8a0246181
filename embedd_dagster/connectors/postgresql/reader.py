"""Reading one table of PostgreSQL: pages in key order, digests, fingerprints.

Every value arrives in the text format: types that the driver does not know come as PostgreSQL's own text then, dates that
Python cannot hold have a text to fall back on, and it was also the faster one (0.6 µs of ours a row of four columns; 0.75
in the binary format).
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO, Any, Final, TypeVar

import numpy as np
import psycopg
from psycopg.abc import AdaptContext
from psycopg.adapt import Buffer, Loader
from psycopg.sql import SQL, Composed
from psycopg.types import datetime as driver_types

from embedd_dagster.connectors.postgresql.errors import translated
from embedd_dagster.connectors.postgresql.estimates import page_count, planner_estimate
from embedd_dagster.connectors.postgresql.introspection import ColumnInfo, Relation
from embedd_dagster.connectors.postgresql.key_checks import check_unique
from embedd_dagster.connectors.postgresql.source_connections import SourceConnections
from embedd_dagster.connectors.postgresql.statements import Statements
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, SourceRow, TableDigest
from embedd_dagster.core.shards import KeyRange, ranges_between
from embedd_dagster.errors import SourceRejected

_MIN_SHARD_ROWS: Final = 2000
_SAMPLED_PAGES_PER_SHARD: Final = 64  # shards then differ by some 12 %
_CHUNKED: Final = psycopg.capabilities.has_stream_chunked()
# The most rows that the driver takes in before their size is seen: of rows of 1 MB, 32 MB.
_PAGE_CHUNK_ROWS: Final = 32 if _CHUNKED else 1
_FINGERPRINT_CHUNK_ROWS: Final = 500 if _CHUNKED else 1
_MAX_BIGINT: Final = 2**63 - 1

T = TypeVar("T")
_Cursor = psycopg.Cursor[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Page:
    rows: list[SourceRow]
    at_end: bool


class PostgresTableReader:
    """One selection of one table. Safe to use from several threads: all that changes are three hints."""

    def __init__(
        self, connections: SourceConnections, relation: Relation, key: ColumnInfo, columns: Sequence[ColumnInfo]
    ) -> None:
        self.key_type = key.ddl_type
        self.origin: dict[str, Any] = {"name": relation.label, "oid": relation.oid}
        self._connections = connections
        self._relation = relation
        self._key = key
        self._statements = Statements(relation, key, columns)
        self._row_bytes = 0.0
        """Of a row of the page last read, on average."""
        self._is_lenient = False
        """Whether there was a value that Python cannot hold, such as the date 'infinity'."""
        self._sorts: bool | None = None

    def count(self) -> int:
        """The number of rows, exactly."""
        with self._cursor() as cursor:
            row = cursor.execute(self._statements.count(), []).fetchone()
        return int(row[0]) if row else 0

    def check_keys(self) -> None:
        """Returns when no two rows have one key: by a constraint, or by one scan of the rows."""
        with self._cursor() as cursor:
            check_unique(cursor.connection, self._relation, self._key)

    def split(self, shard_count: int) -> list[KeyRange]:
        """At most `shard_count` ranges that cover every possible key: by a sample of pages, or of a view by one scan."""
        with self._cursor(lenient=True) as cursor:
            wanted = min(shard_count, planner_estimate(cursor.connection, self._relation) // _MIN_SHARD_ROWS)
            if wanted < 2:
                return [KeyRange()]
            percent: float | None = None
            if self._relation.kind in "rpm":
                pages = page_count(cursor.connection, self._relation)
                percent = min(100.0, 100 * wanted * _SAMPLED_PAGES_PER_SHARD / max(1, pages))
            fractions = [part / wanted for part in range(1, wanted)]
            rows = cursor.execute(self._statements.boundaries(percent), [fractions]).fetchall()
        # An infinite date cannot be a boundary: reading its range reports what is wrong with it.
        return ranges_between([key for key in dict.fromkeys(row[0] for row in rows) if self._can_hold(key)])

    def read(self, key_range: KeyRange, *, page_rows: int, page_bytes: int) -> Iterator[list[SourceRow]]:
        """The rows of a range in key order, in pages; each is fetched whole before it is given."""
        if self._sorts_to_read():
            statement, bounds = self._page_statement(key_range.lower, key_range.upper)
            yield from self._read_whole(statement, [*bounds, None], page_rows=page_rows, page_bytes=page_bytes)
            return
        lower = key_range.lower
        while True:
            page = self._read_page(lower, key_range.upper, page_rows, page_bytes)
            rows, at_end = page.rows, page.at_end
            del page
            if rows:
                lower = rows[-1].key
                yield rows
            if at_end:
                return
            del rows

    def read_keys(self, keys: Sequence[Key], *, page_bytes: int) -> Iterator[list[SourceRow]]:
        """The rows of these keys, in any order, in pages, read when this returns; keys without a row are left out."""
        possible = [key for key in keys if self._is_possible(key)]
        if not possible:
            return iter(())
        return self._read_whole(self._statements.by_keys(), [possible], page_rows=len(possible), page_bytes=page_bytes)

    def digest(self, bits: int) -> TableDigest:
        """The digest of the whole table over 2^bits buckets, in one aggregate query."""
        values = np.zeros(2**bits, dtype=np.int64)
        row_count = 0
        with self._cursor() as cursor:
            for bucket, count, total, mixed in cursor.execute(self._statements.digest(BUCKET_BITS - bits), []):
                content = blake2b(f"{count},{total},{mixed}".encode(), digest_size=8).digest()
                values[bucket] = int.from_bytes(content, "little", signed=True) or 1
                row_count += count
        return TableDigest(bits, values, row_count)

    def fingerprints(self, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        """The fingerprint of every row of these buckets, in no order.

        One statement, open until the iteration ends: a scan in the table's own order is many times cheaper than pages in
        key order from which most rows are filtered out. Memory stays bounded.
        """
        if buckets is not None and not buckets:
            return
        statement = self._statements.fingerprints(None if buckets is None else BUCKET_BITS - bits)
        parameters = [] if buckets is None else [list(buckets)]
        with self._cursor(lenient=True) as cursor:
            for key, row_hash, bucket in cursor.stream(statement, parameters, size=_FINGERPRINT_CHUNK_ROWS):
                self._require_key(key)
                yield Fingerprint(key, row_hash, bucket)

    def _sorts_to_read(self) -> bool:
        """Whether no index gives the key's order, as with a view that groups: each page would be a pass over all of it."""
        if self._sorts is None:
            with self._cursor() as cursor:
                statement = SQL("EXPLAIN (FORMAT JSON) ") + self._statements.page(lower=False, upper=False)
                plan = cursor.execute(statement, [1]).fetchone()
            self._sorts = "'Node Type': 'Sort'" in str(plan)
        return self._sorts

    def _read_whole(
        self, statement: Composed, parameters: list[Any], *, page_rows: int, page_bytes: int
    ) -> Iterator[list[SourceRow]]:
        """The pages of one statement, which has ended when this returns: all but the last wait in a temporary file."""
        with ExitStack() as stack:
            spool = stack.enter_context(tempfile.SpooledTemporaryFile(page_bytes, prefix="embedd-"))
            spooled_count, last = self._retry_leniently(
                lambda cursor: self._fill(
                    spool, cursor.stream(statement, parameters, size=_PAGE_CHUNK_ROWS), page_rows, page_bytes
                )
            )
            return _unspool(stack.pop_all(), spool, spooled_count, last)

    def _fill(
        self, spool: IO[bytes], found: Iterator[tuple[Any, ...]], page_rows: int, page_bytes: int
    ) -> tuple[int, list[SourceRow]]:
        """Puts all pages but the last into the file; gives their number, and the last."""
        spool.seek(0)
        spooled_count, rows, size = 0, list[SourceRow](), 0
        for row in found:
            if len(rows) >= page_rows or size >= page_bytes:
                self._check_keys(rows)
                pickle.dump(rows, spool, pickle.HIGHEST_PROTOCOL)
                spooled_count, rows, size = spooled_count + 1, [], 0
            rows.append(SourceRow(row[0], row[4:], row[1], row[2]))
            size += row[3]
        self._check_keys(rows)
        return spooled_count, rows

    def _page_statement(self, lower: Key | None, upper: Key | None) -> tuple[Composed, list[Key]]:
        statement = self._statements.page(lower=lower is not None, upper=upper is not None)
        return statement, [bound for bound in (lower, upper) if bound is not None]

    def _read_page(self, lower: Key | None, upper: Key | None, page_rows: int, page_bytes: int) -> _Page:
        statement, bounds = self._page_statement(lower, upper)
        limit = page_rows
        if self._row_bytes:  # ask for what fits: a statement that is stopped in its middle costs its connection
            limit = max(1, min(page_rows, int(0.8 * page_bytes / self._row_bytes)))
        return self._retry_leniently(
            lambda cursor: self._take_rows(cursor, statement, [*bounds, limit], limit=limit, page_bytes=page_bytes)
        )

    def _retry_leniently(self, fetch: Callable[[_Cursor], T]) -> T:
        """What `fetch` gives; asked once more where the driver cannot load a value, such as the date 'infinity'."""
        while True:
            lenient = self._is_lenient
            with self._cursor(lenient=lenient) as cursor:
                try:
                    return fetch(cursor)
                except _LOAD_ERRORS as error:
                    if getattr(error, "sqlstate", None):
                        raise
                    cursor.connection.close()  # in the middle of its answer
                    if lenient:
                        raise SourceRejected(f"A value of table {self._relation.label} cannot be read.") from None
            # Rare, and slower for every date of the table: only from now on.
            self._is_lenient = True

    def _take_rows(
        self,
        cursor: _Cursor,
        statement: Composed,
        parameters: list[Any],
        *,
        limit: int,
        page_bytes: int,
    ) -> _Page:
        rows: list[SourceRow] = []
        size = 0
        is_cut = False
        for row in cursor.stream(statement, parameters, size=_PAGE_CHUNK_ROWS):
            rows.append(SourceRow(row[0], row[4:], row[1], row[2]))
            size += row[3]
            if size >= page_bytes and len(rows) != limit:
                cursor.connection.close()  # else the driver would cancel, and take in what is under way
                is_cut = True
                break
        self._check_keys(rows)
        if rows:
            self._row_bytes = size / len(rows)
        return _Page(rows, at_end=not is_cut and len(rows) < limit)

    @contextmanager
    def _cursor(self, *, lenient: bool = False) -> Iterator[_Cursor]:
        with (
            translated(self._connections.server, relation=self._relation.label),
            self._connections.borrow() as connection,
            connection.cursor() as cursor,
        ):
            if lenient:
                for name, loader in _LENIENT_LOADERS.items():
                    cursor.adapters.register_loader(name, loader)
            yield cursor

    def _check_keys(self, rows: list[SourceRow]) -> None:
        if self._is_lenient or self._connections.may_hold_invalid_text:
            for row in rows:
                self._require_key(row.key)

    def _require_key(self, key: Any) -> None:
        if not self._can_hold(key):
            raise SourceRejected(
                f"The primary key column {self._key.name!r} of {self._relation.label} holds a value that can be no key:"
                " an infinite date, one outside of the years 1 to 9999, or text that is not valid UTF-8.",
                resolution="Correct these rows, or choose another primary key column.",
            )

    def _can_hold(self, key: Any) -> bool:
        if self._connections.may_hold_invalid_text and isinstance(key, str) and "\ufffd" in key:
            return False
        return isinstance(key, self._key.key_type or object)

    def _is_possible(self, key: Key) -> bool:
        """Whether a row could have this key; a statement that asks for an impossible one would fail for all of them."""
        if isinstance(key, str):
            return self._key.key_type is str and "\x00" not in key and clean_text(key) == key
        if isinstance(key, int):
            return self._key.key_type is int and -_MAX_BIGINT - 1 <= key <= _MAX_BIGINT
        return type(key) is self._key.key_type  # a datetime is a date to Python, not here


def _unspool(
    owned: ExitStack, spool: IO[bytes], spooled_count: int, last: list[SourceRow]
) -> Iterator[list[SourceRow]]:
    with owned:
        spool.seek(0)
        for _ in range(spooled_count):
            yield pickle.load(spool)  # noqa: S301 - an unnamed file that we wrote
    if last:
        yield last


# What the driver raises for a value that Python has no room for: year 12000, 24:00:00, 5,000 digits.
_LOAD_ERRORS: Final = (psycopg.DataError, ValueError, ArithmeticError)


def _lenient(strict: type[Loader]) -> type[Loader]:
    """A loader that gives PostgreSQL's own text of what `strict` cannot load."""

    class LenientLoader(Loader):
        def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
            super().__init__(oid, context)
            self._strict = strict(oid, context)

        def load(self, data: Buffer) -> Any:
            try:
                return self._strict.load(data)
            except _LOAD_ERRORS:
                return bytes(data).decode(errors="replace")

    return LenientLoader


_LENIENT_LOADERS: Final = {
    "date": _lenient(driver_types.DateLoader),
    "time": _lenient(driver_types.TimeLoader),
    "timetz": _lenient(driver_types.TimetzLoader),
    "timestamp": _lenient(driver_types.TimestampLoader),
    "timestamptz": _lenient(driver_types.TimestamptzLoader),
}
