"""Two values that PostgreSQL tells apart are two texts: of each type its extremes, its special values, its neighbours.

Left out is what one documented form is for: NaN and infinities of numbers are null, nulls of an array are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from embedd_dagster.connectors.registry import open_source
from embedd_dagster.core.embedded_text import render_value
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.protocols.source import Selection, Source
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.connectors.postgresql.test_source import credentials_of

Opened = tuple[psycopg.Connection[Any], Source]


@pytest.fixture(scope="module")
def opened(postgres: EmbeddedPostgres) -> Iterator[Opened]:
    """A database for all tests of this file, and a source that reads it."""
    name = f"values_{uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        with (
            psycopg.connect(postgres.url(name), autocommit=True) as connection,
            open_source("postgresql", credentials_of(postgres.url(name))) as source,
        ):
            connection.execute(
                "CREATE EXTENSION IF NOT EXISTS hstore; CREATE EXTENSION IF NOT EXISTS citext;"
                "CREATE TYPE mood AS ENUM ('happy', 'HAPPY', 'null', 'a,b', 'a\"b');"
                "CREATE TYPE pair AS (amount numeric, note text); CREATE TYPE prices AS RANGE (subtype = numeric);"
                "CREATE DOMAIN document AS jsonb; CREATE DOMAIN span AS interval"
            )
            yield connection, source
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


VALUES: dict[str, tuple[str, ...]] = {
    "int8": ("9223372036854775807", "9223372036854775806", "-9223372036854775808", "0", "-1"),
    "numeric": (
        "12345678901234567890.123456789", "12345678901234567890.123456788", "1.0", "1.00", "1", "1e-300", "0.000",
        "0", "1e130", "99999999999999999999999999999999999999", "99999999999999999999999999999999999998",
    ),
    "float8": (
        "0.1", "0.30000000000000004", "0.3", "5e-324", "1.7976931348623157e308", "1e22", "1e23", "9007199254740993", "-0",
        "0", "9007199254740991",
    ),
    "float4": ("0.1", "0.10000001", "1e-45", "3.4028235e38", "16777216", "16777218", "-0", "0"),
    "money": ("92233720368547758.07", "92233720368547758.06", "-92233720368547758.08", "0", "0.01", "-0.01"),
    "bool": ("true", "false"),
    "text": ("", "a", "a ", "A", "NULL", "\\", '"', "{}", "é", "e\u0301", "\U0001f642", "a\nb", "a\tb"),
    "bpchar": ("a", "A", " a"),
    "citext": ("a", "A"),
    '"char"': ("a", "b", ""),
    "name": ("a", "A"),
    "bytea": ("", "\\x00", "\\x0000", "\\xff", "\\x61"),
    "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    "date": (
        "infinity", "-infinity", "4713-11-24 BC", "0001-01-01 BC", "0001-01-01", "9999-12-31", "10000-01-01", "5874897-12-31",
        "2024-02-29", "0044-03-15 BC", "0044-03-15",
    ),
    "time": ("00:00:00", "24:00:00", "23:59:59.999999", "23:59:59.99999", "12:00:00"),
    "timetz": (
        "12:00:00+00", "12:00:00+01", "12:00:00-01", "12:00:00+15:59:59", "12:00:00+15:59:58", "24:00:00+00", "00:00:00+00",
        "12:00:00.000001+00",
    ),
    "timestamp": (
        "infinity", "-infinity", "4713-11-24 00:00:00 BC", "0001-12-31 BC", "0001-01-01", "9999-12-31 23:59:59.999999",
        "294276-12-31 23:59:59.999999", "294276-12-31 23:59:59.999998", "2024-02-29 00:00:00.000001", "2024-02-29",
        "0099-01-01", "0099-01-01 BC", "12024-02-29",
    ),
    "timestamptz": (
        "infinity", "-infinity", "4713-11-24 00:00:00+00 BC", "0001-01-01 00:00:00+00", "0001-12-31 23:00:00+00 BC",
        "9999-12-31 23:59:59.999999+00", "10000-01-01 00:00:00+00", "2024-02-29 00:00:00+00", "2024-02-29 00:00:00+01",
        "1883-11-18 12:00:00+00", "1883-11-18 12:00:00-00:00:01",
    ),
    "interval": (
        "1 mon", "30 days", "31 days", "1 year", "365 days", "360 days", "1 day", "24 hours", "0", "-1 mon",
        "178000000 years", "-178000000 years", "1 mon -30 days", "0.000001 s", "1 day -1 hour", "23 hours", "infinity",
        "-infinity", "2147483647 days", "876000 hours",
    ),
    "jsonb": (
        "12345678901234567890.123456789", "12345678901234567890.123456788", "1.10", "1.1", "1.0", "1", "1e400", "1e401",
        '{"a": 0.1}', '{"a": 0.10}', '{"a": 0.1000000000000000055511151231257827}', '{"a": [12345678901234567890.5]}',
        '{"a": [12345678901234567890.25]}', '{"a": "x"}', '{"a": null}', "{}", '[{"a": 1.50}, {"b": [1.5]}]',
        '[{"a": 1.5}, {"b": [1.5]}]', '{"1.10": "1.10", "b": 1.10}', '[1.10, 2]', "[1.1, 2]", "[[1.10]]", "[[1.1]]",
        "9007199254740993", "9007199254740992", '"\\"1.5"', '{"a": 1e5000}', '{"a": 1e4999}', '{"a":true}', '{"a":false}',
    ),
    "json": (
        '{"a": 1, "a": 2}', '{"a": 2}', '{"a": 2, "a": 2}', "1e400", "-1e400", "1e-400", "1e-401", "0.1",
        "0.10", '{"a": -0}', '{"a": 0}', '{"a": -0.0}', '{"a": 1E2}', '{"a": 100}', '[{"k": {"x": 1, "x": 2}}]',
        '[{"k": {"x": 2}}]', '{"a": 12345678901234567890.123456789}', '{"a": 12345678901234567890.123456788}',
    ),
    "inet": ("10.0.0.1", "10.0.0.1/8", "10.0.0.0/8", "::1", "::1/64", "::ffff:10.0.0.1"),
    "cidr": ("10.0.0.0/8", "10.0.0.0/9", "::/0", "0.0.0.0/0"),
    "macaddr": ("08:00:2b:01:02:03", "08:00:2b:01:02:04"),
    "bit(3)": ("000", "001", "111"),
    "varbit": ("", "0", "00", "1", "01"),
    "int4range": ("empty", "[1,5)", "[1,)", "(,5)", "(,)", "[1,2147483647)"),
    "numrange": ("[1.0,2)", "[1.00,2)", "(1.0,2)", "[1.0,2]", "empty", "[1,NaN]", "[1,infinity]", "[1,]"),
    "daterange": ("[2024-01-01,infinity)", "[2024-01-01,)", "(,2024-01-01)", "[-infinity,2024-01-01)", "empty"),
    "tstzrange": ("[2024-01-01 00:00+00,infinity)", "[2024-01-01 00:00+00,)", "[2024-01-01 00:00:00.000001+00,)"),
    "nummultirange": ("{}", "{[1.0,2)}", "{[1.00,2)}", "{[1,2),[3,4)}"),
    "oid": ("0", "4294967295", "2147483648"),
    "xid8": ("0", "18446744073709551615", "18446744073709551614"),
    "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF", "FFFFFFFF/FFFFFFFE"),
    "tsvector": ("", "a:1", "a:1A", "a", "'a b':1"),
    "tsquery": ("a & b", "a | b", "a <-> b", "a <2> b"),
    "point": ("(0.1,0.30000000000000004)", "(0.1,0.3)", "(Infinity,0)", "(NaN,0)", "(-0,0)", "(0,0)"),
    "box": ("((1,1),(0,0))", "((1,1),(0,-1))"),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1))"),
    "circle": ("<(0,0),1>", "<(0,0),1.0000000000000002>"),
    "hstore": ('"a"=>NULL', '"a"=>"NULL"', '"a"=>""', "", '"a"=>"1", "b"=>"2"'),
    "mood": ("happy", "HAPPY", "null", "a,b", 'a"b'),
    "pair": ("(1.0,)", "(1.00,)", '(1.0,"")', "(,)", '(NaN,"a,b")', '(1,"a""b")'),
    "prices": ("[1.0,2)", "[1.00,2)", "empty"),
    "document": ("1.10", "1.1", '{"a": 12345678901234567890.5}', '{"a": 12345678901234567890.25}'),
    "span": ("1 mon", "30 days"),
    "jsonpath": ("$.a", '$."a b"', "$.a[*]"),
}  # fmt: skip


def texts_of(opened: Opened, sql_type: str, literals: list[str]) -> list[str | None]:
    """The text that each of these values is embedded as."""
    connection, source = opened
    connection.execute(f"CREATE TABLE t (id int PRIMARY KEY, v {sql_type})")
    try:
        with connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO t VALUES (%s, (%s::text)::{sql_type})", list(enumerate(literals)))
        reader = source.reader(Selection("t", "id", ("v",)))
        rows = [row for page in reader.read(KeyRange(), page_rows=100, page_bytes=2**20) for row in page]
        again = [row for page in reader.read_keys([row.key for row in rows], page_bytes=2**20) for row in page]
        assert sorted(again, key=lambda row: row.key) == rows
        return [render_value(row.values[0]) for row in rows]
    finally:
        connection.execute("DROP TABLE t")


def array_of(literal: str) -> str:
    escaped = literal.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@pytest.mark.parametrize("sql_type", VALUES)
def test_values_that_differ_have_texts_that_differ(opened: Opened, sql_type: str) -> None:
    literals = VALUES[sql_type]
    texts = texts_of(opened, sql_type, list(literals))
    assert None not in texts
    assert len(set(texts)) == len(literals), sorted(zip(map(str, texts), literals, strict=True))


@pytest.mark.parametrize("sql_type", VALUES)
def test_values_that_differ_inside_an_array_have_texts_that_differ(opened: Opened, sql_type: str) -> None:
    comma = ";" if sql_type == "box" else ","
    literals = [literal for literal in VALUES[sql_type] if literal]
    arrays = [f"{{{array_of(literal)}{comma}NULL}}" for literal in literals]
    nested = [f"{{{{{array_of(literal)}}}{comma}{{NULL}}}}" for literal in literals]
    for given in (arrays, nested):
        texts = texts_of(opened, f"{sql_type}[]", given)
        assert None not in texts
        assert len(set(texts)) == len(given), sorted(zip(map(str, texts), given, strict=True))
