"""A source over a database in memory. It has no log of changes, so its tables are synced in batches alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from difflib import get_close_matches
from hashlib import blake2b
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import BUCKET_BITS, Fingerprint, SourceRow, TableDigest
from embedd_dagster.core.shards import KeyRange, ranges_between
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import SourceRejected, SourceTableNotFound, SourceUnavailable
from embedd_dagster.protocols.cdc import CdcTable
from embedd_dagster.protocols.source import Selection, SourceColumn, SourceTable
from tests.support.toy_connector.database import Database, open_database

_ROWS_PER_SHARD = 2000
_NUMBERS = {FilterType.KEYWORD, FilterType.FLOAT}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _filter_types(type_name: str) -> frozenset[FilterType]:
    if type_name.startswith("int"):
        return frozenset(_NUMBERS | {FilterType.INTEGER})
    return frozenset(_NUMBERS if type_name.startswith("numeric") else {FilterType.KEYWORD})


def _hash(*values: Any) -> int:
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "big", signed=True)


class ToySource:
    """Connects when it is first used."""

    def __init__(self, database: str, token: str) -> None:
        self._login = (database, token)
        self._is_closed = False

    @property
    def database(self) -> Database:
        if self._is_closed:
            raise SourceUnavailable("The source is closed.")
        return open_database(*self._login)

    def check(self) -> None:
        self.database.execute("SELECT 1")

    def tables(self, limit: int) -> list[SourceTable]:
        found = self.database.execute(
            "SELECT name, type = 'view' FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name LIMIT ?",
            (limit,),
        )
        return [SourceTable(name, (), bool(is_view), None) for name, is_view in found]

    def describe(self, table: str) -> SourceTable:
        known = {found.name: found for found in self.tables(10_000)}
        if table not in known:
            near = ", ".join(get_close_matches(table, known)) or "no table of a similar name"
            raise SourceTableNotFound(f"There is no table {table!r}.", resolution=f"There is: {near}.")
        columns = tuple(
            SourceColumn(name, kind, not (is_required or in_key), _filter_types(kind.lower()), is_key_type=True)
            for _, name, kind, is_required, _, in_key in self.database.execute(f"PRAGMA table_info({_quoted(table)})")
        )
        return SourceTable(table, columns, known[table].is_view, None)

    def check_key(self, table: str, column: str) -> None:
        self.describe(table)
        sql = f"SELECT count(*), count({_quoted(column)}), count(DISTINCT {_quoted(column)}) FROM {_quoted(table)}"
        [(rows, present, distinct)] = self.database.execute(sql)
        faults = []
        if present > distinct:
            faults.append(f"{present - distinct} rows repeat another row's value")
        if rows > present:
            faults.append(f"{rows - present} row{'s have' if rows - present > 1 else ' has'} no value")
        if faults:
            raise SourceRejected(f"Column {column!r} is not a key of {table!r}: {' and '.join(faults)}.")

    def check_cdc_eligible(self, table: CdcTable) -> None:
        self.describe(table.table)
        raise SourceRejected("A database in memory has no log of changes.", resolution="Use sync_mode batch.")

    def cdc_stream(self, name: str) -> NoReturn:
        raise SourceRejected("A database in memory has no log of changes.", resolution="Use sync_mode batch.")

    def reader(self, selection: Selection) -> ToyReader:
        table = self.describe(selection.table)
        known = [column.name for column in table.columns]
        missing = [name for name in (selection.primary_key_column, *selection.columns) if name not in known]
        if missing:
            near = [repr(name) for name in known if any(get_close_matches(one, [name]) for one in missing)]
            raise SourceTableNotFound(
                f"Table {selection.table!r} does not have {', '.join(map(repr, missing))}.",
                resolution=f"Similar columns: {', '.join(near)}.",
            )
        return ToyReader(self, selection, table)

    def close(self) -> None:
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class ToyReader:
    """A selection of one table."""

    def __init__(self, source: ToySource, selection: Selection, table: SourceTable) -> None:
        self._source = source
        self._selection = selection
        columns = [table.column(name) for name in selection.columns]
        self._is_numeric = [column is not None and column.type.startswith("numeric") for column in columns]
        self._key = _quoted(selection.primary_key_column)
        key_column = table.column(selection.primary_key_column)
        assert key_column is not None
        self.key_type = key_column.type
        self.origin = {"name": selection.table, "oid": selection.table}

    def count(self) -> int:
        return int(self._select("count(*)")[0][0])

    def check_keys(self) -> None:
        self._source.check_key(self._selection.table, self._selection.primary_key_column)

    def split(self, shard_count: int) -> list[KeyRange]:
        count = self.count()
        shards = max(1, min(shard_count, count // _ROWS_PER_SHARD))
        cuts = [count * number // shards - 1 for number in range(1, shards)]
        return ranges_between([self._select(self._key, f"ORDER BY 1 LIMIT 1 OFFSET {cut}")[0][0] for cut in cuts])

    def read(self, key_range: KeyRange, *, page_rows: int, page_bytes: int) -> Iterator[list[SourceRow]]:
        lower = key_range.lower
        while page := self._page(lower, key_range.upper, page_rows, page_bytes):
            yield page
            lower = page[-1].key

    def _page(self, lower: Key | None, upper: Key | None, page_rows: int, page_bytes: int) -> list[SourceRow]:
        bounds = [(sign, key) for sign, key in ((">", lower), ("<=", upper)) if key is not None]
        where = " AND ".join(["TRUE", *(f"{self._key} {sign} ?" for sign, _ in bounds)])
        rows = self._rows(f"WHERE {where} ORDER BY 1 LIMIT {page_rows}", tuple(key for _, key in bounds))
        return next(_within_bytes(rows, page_bytes), [])

    def read_keys(self, keys: Sequence[Key], *, page_bytes: int) -> Iterator[list[SourceRow]]:
        wanted = {(type(key), key) for key in keys}
        return _within_bytes([row for row in self._rows() if (type(row.key), row.key) in wanted], page_bytes)

    def digest(self, bits: int) -> TableDigest:
        values = np.zeros(2**bits, np.int64)
        rows = self._rows()
        with np.errstate(over="ignore"):
            for row in rows:
                values[row.bucket >> (BUCKET_BITS - bits)] += np.int64(row.row_hash)
        return TableDigest(bits, values, len(rows))

    def fingerprints(self, bits: int, buckets: Sequence[int] | None) -> Iterator[Fingerprint]:
        for row in self._rows():
            if buckets is None or row.bucket >> (BUCKET_BITS - bits) in buckets:
                yield Fingerprint(row.key, row.row_hash, row.bucket)

    def _rows(self, rest: str = "", parameters: tuple[Any, ...] = ()) -> list[SourceRow]:
        found = self._select(", ".join([self._key, *map(_quoted, self._selection.columns)]), rest, parameters)
        rows = []
        for key, *values in found:
            read = tuple(
                Decimal(str(value)) if is_numeric and value is not None else value
                for value, is_numeric in zip(values, self._is_numeric, strict=True)
            )
            rows.append(SourceRow(key, read, _hash(key, read), _hash(key) % 2**BUCKET_BITS))
        return rows

    def _select(self, what: str, rest: str = "", parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        self._source.describe(self._selection.table)  # raises if it was dropped
        return self._source.database.execute(f"SELECT {what} FROM {_quoted(self._selection.table)} {rest}", parameters)


def _within_bytes(rows: list[SourceRow], page_bytes: int) -> Iterator[list[SourceRow]]:
    page: list[SourceRow] = []
    size = 0
    for row in rows:
        own = len(repr(row))
        if page and size + own > page_bytes:
            yield page
            page, size = [], 0
        page.append(row)
        size += own
    if page:
        yield page
