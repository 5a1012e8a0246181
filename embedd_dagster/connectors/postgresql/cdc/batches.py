"""pgoutput's messages of some transactions → batches of keys. No I/O.

Every logged row passes this loop. It takes the key's text out of the row, converts it to the same key that a reader of the
table gives, and drops the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from embedd_dagster.connectors.postgresql.cdc import pgoutput
from embedd_dagster.connectors.postgresql.cdc.slot import lsn_text
from embedd_dagster.connectors.postgresql.cdc.tables import ResolvedTable
from embedd_dagster.connectors.postgresql.introspection import ColumnInfo
from embedd_dagster.core.keys import Key
from embedd_dagster.errors import EmbeddError, SourceRejected, SourceTableNotFound
from embedd_dagster.protocols.cdc import CdcTable, ChangeBatch

_KEY_TYPES: Final = (
    "int2", "int4", "int8", "numeric", "uuid", "text", "varchar", "bpchar", "date", "timestamp", "timestamptz",
)  # fmt: skip
# What the driver raises for a value that Python has no room for.
_LOAD_ERRORS: Final = (psycopg.DataError, ValueError, ArithmeticError)


class KeyLoaders:
    """Text → key, by the type that a column had when the row was written, which may have been altered since."""

    def __init__(self, connection: psycopg.Connection[Any], *, may_hold_invalid_text: bool) -> None:
        """Of a session like those of the readers."""
        self._transformer = Transformer(connection)
        self._may_hold_invalid_text = may_hold_invalid_text
        infos = psycopg.adapters.types
        self._by_type: dict[int, Callable[[bytes], Any]] = {
            infos[name].oid: self._loader(name, infos[name].oid) for name in _KEY_TYPES
        }

    def add(self, type_oid: int, column: ColumnInfo) -> None:
        """Registers a type that is not PostgreSQL's own: an enum, citext, a domain."""
        self._by_type.setdefault(type_oid, self._loader(column.base_name, column.type_oid))

    def get(self, type_oid: int) -> Callable[[bytes], Any] | None:
        """Raises one of `_LOAD_ERRORS` for a value that cannot be a key. None for an unknown type."""
        return self._by_type.get(type_oid)

    def _loader(self, base_name: str, base_oid: int) -> Callable[[bytes], Any]:
        found = self._transformer.get_loader(base_oid, pq.Format.TEXT) or self._transformer.get_loader(
            0, pq.Format.TEXT
        )
        if found is None:
            raise TypeError(f"the driver has no loader for type {base_oid}")
        load = found.load
        if base_name == "bpchar":  # as a cast to text, which drops the padding
            return lambda data: (
                _checked(load(data.rstrip(b" "))) if self._may_hold_invalid_text else load(data.rstrip(b" "))
            )
        if self._may_hold_invalid_text:
            return lambda data: _checked(load(data))
        return load


def _checked(key: Any) -> Any:
    if isinstance(key, str) and "\ufffd" in key:
        raise ValueError("text that is not UTF-8")
    return key


@dataclass(slots=True)
class _Target:
    """A CDC table, and where its key is in the logged rows of one table."""

    table: CdcTable
    column: int = 0
    load: Callable[[bytes], Any] = bytes
    in_identity: bool = True
    broken: EmbeddError | None = None
    """Why none of its rows can be understood."""


@dataclass(slots=True)
class _Open:
    keys: dict[CdcTable, dict[Key, None]] = field(default_factory=dict)
    truncated: set[CdcTable] = field(default_factory=set)
    broken: dict[CdcTable, EmbeddError] = field(default_factory=dict)
    key_count: int = 0
    change_count: int = 0
    committed_at: datetime | None = None
    position: int | None = None
    transactions: set[int] = field(default_factory=set)

    def closed(self, position: int | None) -> ChangeBatch:
        keys = {table: list(found) for table, found in self.keys.items() if found}
        text = None if position is None else lsn_text(position)
        return ChangeBatch(
            keys, self.truncated, self.broken, self.change_count, self.committed_at, text, self.transactions
        )


class ChangeBatches:
    """Makes batches of a stream of messages that begins at the start of a transaction, and ends at the end of one."""

    def __init__(
        self, by_oid: Mapping[int, Sequence[ResolvedTable]], loaders: KeyLoaders, *, max_keys: int, given: int
    ) -> None:
        """`given`: transactions before this position are skipped, as earlier batches had them."""
        self._by_oid = by_oid
        self._loaders = loaders
        self._max_keys = max_keys
        self._given = given
        self._targets: dict[int, list[_Target]] = {}
        self._open = _Open()
        self._committed_at: datetime | None = None
        self._xid = 0
        self._skips = False
        self.message_count = 0
        self.change_count = 0
        self.position = given
        """The end of the last transaction."""

    def of(self, messages: Iterable[bytes]) -> Iterator[ChangeBatch]:
        """All full batches; the rest is in `last`. Raises MalformedMessage."""
        targets_of = self._targets
        for data in messages:
            self.message_count += 1
            if data[0] in pgoutput.ROW_KINDS:
                targets = targets_of.get(pgoutput.relation_oid(data))
                if not targets or self._skips:
                    continue
                self._count()
                for target in targets:
                    self._take(data, target)
            else:
                self._take_other(pgoutput.decode(data))
            if self._open.key_count >= self._max_keys:
                yield self._flush(self._open.position)

    def last(self, position: int | None) -> ChangeBatch | None:
        """What is left: with a position, always; without one, what there is, up to the end of the last transaction."""
        if position is None and self._open.position is None and not self._open.change_count:
            return None
        return self._flush(position or self._open.position)

    def _flush(self, position: int | None) -> ChangeBatch:
        batch, self._open = self._open.closed(position), _Open()
        return batch

    def _count(self) -> None:
        opened = self._open
        opened.change_count += 1
        opened.transactions.add(self._xid)
        self.change_count += 1
        if opened.committed_at is None:
            opened.committed_at = self._committed_at

    def _take(self, data: bytes, target: _Target) -> None:
        if target.broken is not None:
            self._open.broken[target.table] = target.broken
            return
        if data[0] == pgoutput.INSERT:
            self._add(pgoutput.inserted_value(data, target.column), target)
            return
        change = pgoutput.changed_values(data, target.column)
        if not target.in_identity:
            self._break(target, "the replica identity did not hold it")
        if change.has_old:
            self._add(change.old, target)
        if change.has_new and not (change.new == pgoutput.UNCHANGED and isinstance(change.old, bytes)):
            self._add(change.new, target)

    def _add(self, value: pgoutput.Value, target: _Target) -> None:
        if (
            value is None
        ):  # a row without a key, which a reader leaves out; or an old row, whose identity lacks the column
            return
        if isinstance(value, pgoutput.Unchanged):
            self._break(target, "the log does not hold its value")
            return
        try:
            key = target.load(value)
        except _LOAD_ERRORS:
            self._break(target, "a value cannot be a key: an infinite date, or text that is not valid UTF-8")
            return
        keys = self._open.keys.get(target.table)
        if keys is None:
            keys = self._open.keys[target.table] = {}
        if key not in keys:
            keys[key] = None
            self._open.key_count += 1

    def _break(self, target: _Target, why: str) -> None:
        table = target.table
        self._open.broken[table] = SourceRejected(
            f"A change of table {table.table!r} cannot be read from its column {table.primary_key_column!r}: {why}."
        )

    def _take_other(self, message: pgoutput.Message) -> None:
        match message:
            case pgoutput.Begin():
                self._skips = message.commit_lsn < self._given
                self._committed_at, self._xid = message.committed_at, message.xid
            case pgoutput.Commit():
                self.position = max(self.position, message.end_lsn)
                self._open.position = self.position
            case pgoutput.Relation():
                found = self._by_oid.get(message.oid, ())
                self._targets[message.oid] = [self._target(one, message) for one in found]
            case pgoutput.Truncate() if not self._skips:
                tables = {one.table for oid in message.relation_oids for one in self._by_oid.get(oid, ())}
                if tables:
                    self._count()
                    self._open.truncated |= tables
            case _:
                pass

    def _target(self, one: ResolvedTable, relation: pgoutput.Relation) -> _Target:
        name, label = one.key.name, one.relation.label
        column = next((column for column in relation.columns if column.name == name), None)
        if column is None:
            gone = SourceTableNotFound(f"Table {label} has no column {name!r} any more.", columns=[name])
            return _Target(one.table, broken=gone)
        load = self._loaders.get(column.type_oid)
        if load is None:
            altered = SourceRejected(f"The type of column {name!r} of {label} was altered.")
            return _Target(one.table, broken=altered)
        return _Target(one.table, relation.columns.index(column), load, column.in_identity)
