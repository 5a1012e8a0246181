"""The messages of PostgreSQL's output plugin `pgoutput`, protocol version 1: bytes → what they say. No I/O.

Only what CDC of keys needs: of a row's message, the value of one column is taken out, and the others are skipped
without being looked at. `decode` is for all other messages. Values are PostgreSQL's own text.

https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

INSERT: Final = ord("I")
UPDATE: Final = ord("U")
DELETE: Final = ord("D")
ROW_KINDS: Final = frozenset({INSERT, UPDATE, DELETE})

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_UINT32: Final = struct.Struct(">I")
_UINT16: Final = struct.Struct(">H")
_BEGIN: Final = struct.Struct(">QqI")
_COMMIT: Final = struct.Struct(">BQQq")
_COLUMN_TYPE: Final = struct.Struct(">Ii")
_TRUNCATE: Final = struct.Struct(">IB")

_NULL: Final = ord("n")
_UNCHANGED: Final = ord("u")
_TEXT: Final = ord("t")
_BINARY: Final = ord("b")
_NEW: Final = ord("N")
_OLD: Final = frozenset(b"KO")


class MalformedMessage(Exception):
    """Bytes that are no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A large value, stored out of line, that the statement left as it was: the log does not hold it."""


UNCHANGED: Final = Unchanged()

Value = bytes | Unchanged | None
"""A column's value as text; None is NULL."""


@dataclass(frozen=True, slots=True)
class Begin:
    """What follows is of one transaction, up to its Commit."""

    commit_lsn: int
    committed_at: datetime
    xid: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The transaction is complete; the log continues at `end_lsn`."""

    commit_lsn: int
    end_lsn: int
    committed_at: datetime


@dataclass(frozen=True, slots=True)
class Column:
    """A column as it was when the rows that follow were written."""

    name: str
    type_oid: int
    in_identity: bool
    """Whether it is of the replica identity: whether old rows hold it."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as it was when the rows that follow were written; comes before its first row, and after every change."""

    oid: int
    schema: str
    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Truncate:
    """Tables that were emptied together."""

    relation_oids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Other:
    """A message that says nothing of rows: a type, an origin, or one that an application wrote."""


Message = Begin | Commit | Relation | Truncate | Other


def decode(data: bytes) -> Message:
    """Any message but those of rows (`ROW_KINDS`). Raises MalformedMessage."""
    try:
        kind = data[:1]
        if kind == b"B":
            lsn, microseconds, xid = _BEGIN.unpack_from(data, 1)
            return Begin(lsn, _time(microseconds), xid)
        if kind == b"C":
            _flags, lsn, end_lsn, microseconds = _COMMIT.unpack_from(data, 1)
            return Commit(lsn, end_lsn, _time(microseconds))
        if kind == b"R":
            return _relation(data)
        if kind == b"T":
            count, _flags = _TRUNCATE.unpack_from(data, 1)
            return Truncate(struct.unpack_from(f">{count}I", data, 1 + _TRUNCATE.size))
    except (struct.error, IndexError, ValueError, OverflowError, MemoryError) as error:
        raise MalformedMessage(f"a message {data[:1]!r} of {len(data)} bytes") from error
    if kind in (b"Y", b"O", b"M"):
        return Other()
    raise MalformedMessage(f"a message of unknown kind {kind!r}")


def relation_oid(data: bytes) -> int:
    """Whose row a message of `ROW_KINDS` is about."""
    try:
        return int(_UINT32.unpack_from(data, 1)[0])
    except struct.error as error:
        raise MalformedMessage(f"a row of {len(data)} bytes") from error


@dataclass(frozen=True, slots=True)
class OldAndNew:
    """The value of one column in an update or a delete, before and after, if there is such a row."""

    has_old: bool
    old: Value
    has_new: bool
    new: Value


def inserted_value(data: bytes, column: int) -> Value:
    """The value of the column of this index in the row that was inserted. Raises MalformedMessage."""
    try:
        if data[5] != _NEW:
            raise MalformedMessage("an insert without a row")
        return _value(data, 6, column)[0]
    except (struct.error, IndexError) as error:
        raise MalformedMessage(f"an insert of {len(data)} bytes") from error


def changed_values(data: bytes, column: int) -> OldAndNew:
    """The values of the column of this index, of an update or a delete. Raises MalformedMessage.

    The old row is there when the replica identity is all of it, or when an update changed a column of the identity. It
    then holds the columns of the identity alone, and NULL for the others.
    """
    try:
        has_old, old, position = data[5] in _OLD, None, 5
        if has_old:
            if data[0] == DELETE:
                return OldAndNew(True, _value(data, 6, column)[0], False, None)
            old, position = _value(data, 6, column, to_end=True)
        if data[0] == DELETE or data[position] != _NEW:
            raise MalformedMessage("a change without a row")
        return OldAndNew(has_old, old, True, _value(data, position + 1, column)[0])
    except (struct.error, IndexError) as error:
        raise MalformedMessage(f"a change of {len(data)} bytes") from error


def _value(data: bytes, position: int, column: int, *, to_end: bool = False) -> tuple[Value, int]:
    """The value of a column of the row at this position; and, if it is wanted, where the row ends."""
    count = _UINT16.unpack_from(data, position)[0]
    position += 2
    if column >= count:
        raise MalformedMessage(f"a row of {count} columns")
    value: Value = None
    for index in range(count if to_end else column + 1):
        kind = data[position]
        position += 1
        if kind in (_TEXT, _BINARY):
            start = position + 4
            position = start + _UINT32.unpack_from(data, position)[0]
            if index == column:
                value = data[start:position]
                if kind == _BINARY or position > len(data):  # we never ask for the binary form
                    raise MalformedMessage("a value that is not text, or that is cut off")
        elif kind == _UNCHANGED:
            if index == column:
                value = UNCHANGED
        elif kind != _NULL:
            raise MalformedMessage(f"a value of unknown kind {kind}")
    return value, position


def _relation(data: bytes) -> Relation:
    oid = _UINT32.unpack_from(data, 1)[0]
    schema, position = _text(data, 5)
    name, position = _text(data, position)
    count = _UINT16.unpack_from(data, position + 1)[0]  # after the replica identity, which each column's flags say too
    position += 3
    columns = []
    for _ in range(count):
        in_identity = bool(data[position] & 1)
        column, position = _text(data, position + 1)
        type_oid, _modifier = _COLUMN_TYPE.unpack_from(data, position)
        position += _COLUMN_TYPE.size
        columns.append(Column(column, type_oid, in_identity))
    return Relation(oid, schema or "pg_catalog", name, tuple(columns))


def _text(data: bytes, position: int) -> tuple[str, int]:
    end = data.index(b"\x00", position)
    return data[position:end].decode(errors="replace"), end + 1


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
