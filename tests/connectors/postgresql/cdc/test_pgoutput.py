"""The decoder of pgoutput, against a tiny encoder of the documented formats. What the server sends is tried elsewhere."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedd_dagster.connectors.postgresql.cdc import pgoutput
from embedd_dagster.connectors.postgresql.cdc.pgoutput import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    MalformedMessage,
    OldAndNew,
    Other,
    Relation,
    Truncate,
    Value,
)

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

values = st.one_of(st.none(), st.just(UNCHANGED), st.binary(max_size=20))
rows = st.lists(values, min_size=1, max_size=6)
names = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=10)
oids = st.integers(0, 2**32 - 1)
lsns = st.integers(0, 2**64 - 1)
instants = st.integers(0, 10**17)


def encode_row(row: Sequence[Value]) -> bytes:
    parts = [struct.pack(">H", len(row))]
    for value in row:
        if value is None:
            parts.append(b"n")
        elif isinstance(value, bytes):
            parts.append(b"t" + struct.pack(">I", len(value)) + value)
        else:
            parts.append(b"u")
    return b"".join(parts)


def change(kind: bytes, oid: int, old: bytes, old_row: Sequence[Value] | None, row: Sequence[Value] | None) -> bytes:
    message = kind + struct.pack(">I", oid)
    if old_row is not None:
        message += old + encode_row(old_row)
    return message + (b"" if row is None else b"N" + encode_row(row))


def encode_relation(relation: Relation, replica_identity: bytes = b"d") -> bytes:
    message = b"R" + struct.pack(">I", relation.oid) + relation.schema.encode() + b"\0" + relation.name.encode() + b"\0"
    message += replica_identity + struct.pack(">H", len(relation.columns))
    for column in relation.columns:
        message += bytes([column.in_identity]) + column.name.encode() + b"\0" + struct.pack(">Ii", column.type_oid, -1)
    return message


@given(oids, rows)
def test_insert(oid: int, row: list[Value]) -> None:
    data = change(b"I", oid, b"", None, row)
    assert pgoutput.relation_oid(data) == oid
    assert [pgoutput.inserted_value(data, column) for column in range(len(row))] == row


@given(oids, st.sampled_from([b"K", b"O"]), st.lists(st.tuples(values, values), min_size=1, max_size=6), st.booleans())
def test_update(oid: int, old: bytes, pairs: list[tuple[Value, Value]], has_old: bool) -> None:
    olds, news = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    data = change(b"U", oid, old, olds if has_old else None, news)
    assert pgoutput.relation_oid(data) == oid
    for column, (before, after) in enumerate(pairs):
        expected = OldAndNew(has_old, before if has_old else None, True, after)
        assert pgoutput.changed_values(data, column) == expected


@given(oids, st.sampled_from([b"K", b"O"]), rows)
def test_delete(oid: int, old: bytes, row: list[Value]) -> None:
    data = change(b"D", oid, old, row, None)
    assert pgoutput.relation_oid(data) == oid
    for column, value in enumerate(row):
        assert pgoutput.changed_values(data, column) == OldAndNew(True, value, False, None)


@given(st.builds(Relation, oids, names, names, st.lists(st.builds(Column, names, oids, st.booleans())).map(tuple)))
def test_relation(relation: Relation) -> None:
    assert pgoutput.decode(encode_relation(relation)) == relation


def test_a_relation_of_the_system_has_no_schema() -> None:
    assert pgoutput.decode(encode_relation(Relation(1, "", "t", ()))) == Relation(1, "pg_catalog", "t", ())


@given(lsns, lsns, instants, oids)
def test_begin_and_commit(lsn: int, end_lsn: int, microseconds: int, xid: int) -> None:
    instant = EPOCH + timedelta(microseconds=microseconds)
    assert pgoutput.decode(b"B" + struct.pack(">QqI", lsn, microseconds, xid)) == Begin(lsn, instant, xid)
    commit = b"C" + struct.pack(">BQQq", 0, lsn, end_lsn, microseconds)
    assert pgoutput.decode(commit) == Commit(lsn, end_lsn, instant)


@given(st.lists(oids, max_size=5), st.integers(0, 3))
def test_truncate(relations: list[int], flags: int) -> None:
    data = b"T" + struct.pack(f">IB{len(relations)}I", len(relations), flags, *relations)
    assert pgoutput.decode(data) == Truncate(tuple(relations))


@pytest.mark.parametrize("data", [b"Y\x00\x00\x00\x01public\x00mood\x00", b"O" + b"\x00" * 9, b"M\x00" + b"\x00" * 12])
def test_messages_that_say_nothing_of_rows(data: bytes) -> None:
    assert pgoutput.decode(data) == Other()


@given(st.binary(max_size=60), st.integers(0, 5))
def test_whatever_the_bytes_are_there_is_one_error(data: bytes, column: int) -> None:
    for decode in (
        lambda: pgoutput.decode(data),
        lambda: pgoutput.relation_oid(data),
        lambda: pgoutput.inserted_value(b"I" + data, column),
        lambda: pgoutput.changed_values(b"U" + data, column),
        lambda: pgoutput.changed_values(b"D" + data, column),
    ):
        with contextlib.suppress(MalformedMessage):
            decode()


@given(oids, st.binary(min_size=1, max_size=20), st.data())
def test_a_value_that_is_cut_off_is_no_value(oid: int, value: bytes, data: st.DataObject) -> None:
    message = change(b"I", oid, b"", None, [value])
    cut = data.draw(st.integers(1, len(message) - 1))
    with pytest.raises(MalformedMessage):
        pgoutput.inserted_value(message[:cut], 0)


def test_what_protocol_version_1_never_sends() -> None:
    for data in (b"", b"S", b"b", b"\xff"):
        with pytest.raises(MalformedMessage):
            pgoutput.decode(data)
    with pytest.raises(MalformedMessage):  # a binary value
        pgoutput.inserted_value(b"I\0\0\0\1N\0\1b\0\0\0\1x", 0)
    with pytest.raises(MalformedMessage):  # fewer columns than the relation had
        pgoutput.inserted_value(change(b"I", 1, b"", None, [b"x"]), 1)
