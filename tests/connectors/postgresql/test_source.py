"""What is PostgreSQL's own: names, types, rights, errors, sessions. The contract is in tests/contracts/test_source.py."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors as psycopg_errors

from embedd_dagster.connectors.postgresql.credentials import Server
from embedd_dagster.connectors.postgresql.errors import translate
from embedd_dagster.connectors.registry import open_source
from embedd_dagster.core.embedded_text import render_value
from embedd_dagster.core.json_text import JsonNumber
from embedd_dagster.core.keys import Key, decode_key, encode_key
from embedd_dagster.core.rows import SourceRow
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import (
    ConfigurationError,
    EmbeddError,
    SourceAccessDenied,
    SourceRejected,
    SourceTableNotFound,
    SourceUnavailable,
)
from embedd_dagster.protocols.source import Selection, Source, TableReader
from tests.support.cdc_source import credentials_of

EVERYTHING = KeyRange()


@pytest.fixture
def admin(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def source(database_url: str) -> Iterator[Source]:
    with open_source("postgresql", credentials_of(database_url)) as opened:
        yield opened


@pytest.fixture
def role(admin: psycopg.Connection[Any]) -> Iterator[tuple[str, str]]:
    """A user without any right, and a password of the kind that breaks URLs."""
    name, password = f"reader_{uuid4().hex[:8]}", "p@ss/w:rd% '\"\\ &ü"
    literal = psycopg.sql.Literal(password)
    admin.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(psycopg.sql.Identifier(name), literal))
    yield name, password
    admin.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_keys(reader: TableReader, keys: list[Key]) -> list[SourceRow]:
    return [row for page in reader.read_keys(keys, page_bytes=2**20) for row in page]


def values_of(source: Source, table: str, *columns: str) -> list[tuple[Any, ...]]:
    reader = source.reader(Selection(table, "id", columns))
    return [row.values for page in reader.read(EVERYTHING, page_rows=100, page_bytes=2**20) for row in page]


class TestNames:
    @pytest.mark.parametrize(
        ("ddl", "given"),
        [
            ("items", "items"),
            ("items", "ITEMS"),
            ("items", "public.items"),
            ("items", "Public.Items"),
            ('"Items"', "Items"),
            ('"Items"', '"Items"'),
            ('"sp ace"', "sp ace"),
            ('"a.b"', "a.b"),
            ('"a.b"', 'public."a.b"'),
            ('"a.b"', "public.a.b"),
            ('"per%cent %s {}"', "per%cent %s {}"),
            ('"qu""ote"', '"qu""ote"'),
            ('"; drop table x; --"', "; drop table x; --"),
            ('"Straße 🙂"', "Straße 🙂"),
        ],
    )
    def test_a_table_is_found_and_read(self, admin, source: Source, ddl: str, given: str) -> None:
        admin.execute(f'CREATE TABLE {ddl} ("Id %s" int PRIMARY KEY, "Na.me {{}}" text)')
        admin.execute(f"INSERT INTO {ddl} SELECT g, 'x' FROM generate_series(1, 3) g")
        reader = source.reader(Selection(given, "Id %s", ("Na.me {}",)))
        assert [row.values for page in reader.read(EVERYTHING, page_rows=2, page_bytes=99) for row in page] == [
            ("x",)
        ] * 3
        assert reader.digest(2).row_count == len(list(reader.fingerprints(2, [0, 1, 2, 3]))) == 3
        source.check_key(given, "Id %s")
        again = source.describe(given).name
        assert source.describe(again).name == again
        assert [table.name for table in source.tables(5)] == [again]

    def test_other_schemas(self, admin, source: Source) -> None:
        admin.execute('CREATE SCHEMA "My Schema"; CREATE TABLE "My Schema"."My.Table" (id int PRIMARY KEY)')
        for given in ('"My Schema"."My.Table"', "My Schema.My.Table"):
            assert source.describe(given).name == 'My Schema."My.Table"'
        with pytest.raises(SourceTableNotFound):
            source.describe("My.Table")
        with pytest.raises(SourceTableNotFound):
            source.describe('"my schema"."My.Table"')

    def test_exact_case_wins_over_folded(self, admin, source: Source) -> None:
        admin.execute('CREATE TABLE users (id int PRIMARY KEY, "Name" text, name int)')
        admin.execute('CREATE TABLE "Users" (id uuid PRIMARY KEY)')
        assert source.describe("Users").columns[0].type == "uuid"
        assert source.describe("USERS").columns[0].type == "integer"
        admin.execute("INSERT INTO users VALUES (1, 'text', 7)")
        assert values_of(source, "users", "Name", "name", "NAME") == [("text", 7, 7)]

    @pytest.mark.parametrize("given", ["", "\x00", '"', "a.", ".a", "...", '"a"."b"."c"', "🙂" * 200])
    def test_what_is_no_name_is_not_found(self, source: Source, given: str) -> None:
        with pytest.raises(SourceTableNotFound):
            source.describe(given)

    def test_a_view_that_must_be_sorted_is_computed_once(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int, v date)")
        admin.execute("INSERT INTO t SELECT g % 500, '2024-01-01' FROM generate_series(1, 1000) g")
        admin.execute("CREATE VIEW v AS SELECT id, max(v) AS v FROM t GROUP BY id")
        reader: Any = source.reader(Selection("v", "id", ("v",)))
        statements = []
        fill = reader._fill
        reader._fill = lambda *args: (statements.append(1), fill(*args))[1]
        reader._read_page = None
        for infinite in (False, True):
            pages = list(reader.read(EVERYTHING, page_rows=150, page_bytes=2**20))
            assert [len(page) for page in pages] == [150, 150, 150, 50]
            assert [row.key for page in pages for row in page] == list(range(500))
            assert (pages[0][7].values == ("infinity",)) is infinite
            narrow = list(reader.read(KeyRange(10, 20), page_rows=3, page_bytes=1))
            assert [page[0].key for page in narrow] == list(range(11, 21))
            admin.execute("UPDATE t SET v = 'infinity' WHERE id = 7")
        assert len(statements) == 5  # one of them a second time, for the date

    def test_every_kind_of_relation(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE base (id int PRIMARY KEY, v text); INSERT INTO base VALUES (1, 'a'), (2, 'b')")
        admin.execute("CREATE VIEW v AS SELECT * FROM base")
        admin.execute("CREATE MATERIALIZED VIEW m AS SELECT * FROM base")
        admin.execute("CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)")
        admin.execute("CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (2)")
        admin.execute("CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (2) TO (9); INSERT INTO p SELECT * FROM base")
        for name in "vmp":
            assert values_of(source, name, "v") == [("a",), ("b",)]
            source.check_key(name, "id")
        assert [(table.name, table.is_view) for table in source.tables(9)] == [
            ("base", False), ("m", True), ("p", False), ("v", True),
        ]  # fmt: skip
        admin.execute("ANALYZE")
        assert source.describe("p").row_estimate == source.describe("base").row_estimate == 2
        assert source.describe("v").row_estimate is None

    def test_a_table_that_was_never_analyzed_is_reckoned_by_its_pages(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off)")
        assert source.describe("t").row_estimate == 0
        for rows in (30, 5000):
            admin.execute(
                "INSERT INTO t SELECT n, repeat('x', 30) FROM generate_series(1, %s) n ON CONFLICT DO NOTHING", [rows]
            )
            assert rows / 5 < (source.describe("t").row_estimate or 0) < rows * 5


KEYS: dict[str, tuple[str, list[Any]]] = {
    "smallint": ("smallint", [-5, 0, 7]),
    "bigint": ("bigint", [-(2**63), 0, 2**63 - 1]),
    "text": ('text COLLATE "C"', ["", "B", "a", "a\nb", "ü🙂"]),
    "text in a collation": ("text COLLATE pg_c_utf8", ["A", "a", "b", "ü"]),
    "varchar": ("varchar(5)", ["ab", "abcde"]),
    "char": ("char(5)", ["ab", "abcde"]),
    "citext": ("citext", ["Ab", "b"]),
    "uuid": ("uuid", [UUID(int=1), UUID(int=2**127)]),
    "numeric": ("numeric", [Decimal("-1.50"), Decimal("0"), Decimal(10**30), Decimal("NaN")]),
    "date": ("date", [date(1, 1, 1), date(2024, 2, 29), date(9999, 12, 31)]),
    "timestamp": (
        "timestamp",
        [datetime.fromisoformat("1999-01-01"), datetime.fromisoformat("2024-01-01T01:02:03.000456")],
    ),
    "timestamptz": ("timestamptz", [datetime(1999, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, 1, 2, 3, 456, UTC)]),
    "enum": ('"Mood %"', ["sad", "fine", "happy"]),
    "domain": ("positive", [1, 2]),
}


class TestKeys:
    @pytest.fixture(autouse=True)
    def _types(self, admin) -> None:
        admin.execute("CREATE EXTENSION citext; CREATE TYPE \"Mood %\" AS ENUM ('sad', 'fine', 'happy')")
        admin.execute("CREATE DOMAIN positive AS bigint CHECK (VALUE > 0)")

    @pytest.mark.parametrize("kind", KEYS)
    def test_every_key_type_pages_and_comes_back(self, admin, source: Source, kind: str) -> None:
        ddl, keys = KEYS[kind]
        admin.execute(f"CREATE TABLE t (id {ddl} PRIMARY KEY, v text)")
        for key in reversed(keys):
            admin.execute(f"INSERT INTO t VALUES (%s::{ddl.split(' COLLATE')[0].replace('%', '%%')}, 'x')", [key])
        assert source.describe("t").columns[0].is_key_type
        source.check_key("t", "id")
        reader = source.reader(Selection("t", "id", ("v",)))
        rows = [page[0] for page in reader.read(EVERYTHING, page_rows=1, page_bytes=999)]
        texts = [encode_key(row.key) for row in rows]
        assert texts == [encode_key(key) for key in keys]
        assert [type(row.key) for row in rows] == [type(key) for key in keys]
        # as a checkpoint would
        lower, upper = decode_key(texts[0]), decode_key(texts[-1])
        between = [row for page in reader.read(KeyRange(lower, upper), page_rows=9, page_bytes=999) for row in page]
        assert [encode_key(row.key) for row in between] == texts[1:]
        again = {encode_key(row.key): row[2:] for row in read_keys(reader, [decode_key(text) for text in texts])}
        assert again == {text: row[2:] for text, row in zip(texts, rows, strict=True)}
        points = {encode_key(point.key): point[1:] for point in reader.fingerprints(1, [0, 1])}
        assert points == {text: row[2:] for text, row in zip(texts, rows, strict=True)}

    @pytest.mark.parametrize("kind", KEYS)
    def test_pages_come_by_the_index(self, admin, database_url: str, kind: str) -> None:
        ddl, keys = KEYS[kind]
        admin.execute(f"CREATE TABLE t (id {ddl} PRIMARY KEY, v text)")
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET enable_seqscan = off")  # the table is empty
        admin.execute("CREATE EXTENSION IF NOT EXISTS citext")
        with open_source("postgresql", credentials_of(database_url)) as source:
            reader: Any = source.reader(Selection("t", "id", ("v",)))
            statement = psycopg.sql.SQL("EXPLAIN ") + reader._statements.page(lower=True, upper=True)
            keyed = psycopg.sql.SQL("EXPLAIN ") + reader._statements.by_keys()
            with reader._connections.borrow() as connection:
                plan = connection.execute(statement, [keys[0], keys[-1], 5]).fetchall()
                plan_by_keys = connection.execute(keyed, [keys]).fetchall()
        assert "Index Cond" in str(plan)
        assert "Sort" not in str(plan)
        if kind != "enum":
            assert "Index Cond" in str(plan_by_keys)

    def test_a_numeric_key_is_one_whatever_its_scale(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id numeric PRIMARY KEY, v text); INSERT INTO t VALUES (1.0, 'x')")
        reader = source.reader(Selection("t", "id", ("v",)))
        (before,) = read_keys(reader, [Decimal("1")])
        admin.execute("UPDATE t SET id = 1.000")
        (after,) = reader.fingerprints(0, None)
        assert after.bucket == before.bucket

    @pytest.mark.parametrize(
        ("ddl", "value"),
        [("date", "infinity"), ("date", "0044-03-15 BC"), ("timestamp", "12000-01-01"), ("timestamptz", "-infinity")],
    )
    def test_a_key_outside_of_the_calendar_is_refused(self, admin, source: Source, ddl: str, value: str) -> None:
        admin.execute(f"CREATE TABLE t (id {ddl} PRIMARY KEY); INSERT INTO t VALUES ('2024-01-01'), ('{value}')")
        reader = source.reader(Selection("t", "id", ()))
        for read in (
            lambda: list(reader.read(EVERYTHING, page_rows=9, page_bytes=999)),
            lambda: list(reader.fingerprints(0, None)),
        ):
            with pytest.raises(SourceRejected, match="primary key column 'id'") as caught:
                read()
            assert value not in caught.value.message

    def test_infinite_keys_are_no_boundaries(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id timestamp PRIMARY KEY)")
        admin.execute("INSERT INTO t SELECT '2024-01-01'::date + g FROM generate_series(1, 9000) g")
        admin.execute("CREATE VIEW v AS SELECT CASE WHEN id > '2030-01-01' THEN 'infinity' ELSE id END AS id FROM t")
        admin.execute("ANALYZE t")
        ranges = source.reader(Selection("v", "id", ())).split(4)
        assert [part for part in ranges if isinstance(part.upper, str)] == []

    @pytest.mark.parametrize("ddl", ["json", "bytea", "float8", "int[]", "boolean", "interval", "point"])
    def test_other_types_are_no_keys(self, admin, source: Source, ddl: str) -> None:
        admin.execute(f"CREATE TABLE t (id {ddl}, v text)")
        assert not source.describe("t").columns[0].is_key_type
        with pytest.raises(SourceRejected, match="no primary key"):
            source.check_key("t", "id")
        with pytest.raises(SourceRejected, match="no primary key"):
            source.reader(Selection("t", "id", ("v",)))

    @pytest.mark.parametrize(
        "index",
        [
            "CREATE UNIQUE INDEX ON t (id) WHERE v > 0",
            "CREATE UNIQUE INDEX ON t (id, v)",
            "CREATE UNIQUE INDEX ON t ((id + v))",
            "CREATE INDEX ON t (id)",
        ],
    )
    def test_an_index_that_proves_nothing_is_not_believed(self, admin, source: Source, index: str) -> None:
        admin.execute(f"CREATE TABLE t (id int NOT NULL, v int); {index}")
        admin.execute("INSERT INTO t VALUES (1, 0), (1, -1)")
        with pytest.raises(SourceRejected, match="1 row repeats"):
            source.check_key("t", "id")

    def test_a_nullable_unique_column_is_a_key_while_it_has_no_nulls(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int UNIQUE); INSERT INTO t VALUES (1)")
        source.check_key("t", "id")
        admin.execute("INSERT INTO t SELECT null FROM generate_series(1, 12)")
        with pytest.raises(SourceRejected, match="12 rows have no value"):
            source.check_key("t", "id")
        reader = source.reader(Selection("t", "id", ()))
        assert reader.count() == reader.digest(0).row_count == len(list(reader.fingerprints(0, None))) == 1
        assert [page[0].key for page in reader.read(EVERYTHING, page_rows=9, page_bytes=999)] == [1]

    def test_key_type_is_good_in_ddl(self, admin, source: Source) -> None:
        admin.execute(
            'CREATE TABLE t (a varchar(5), b numeric(10,2), c positive, d char(3), e timestamptz, f "Mood %")'
        )
        for column in "abcdef":
            reader = source.reader(Selection("t", column, ("a",)))
            admin.execute(f"CREATE TABLE u{column} (pk_value {reader.key_type} PRIMARY KEY)")


VALUES: list[tuple[str, str, Any]] = [
    ("text", "'a''b'", "a'b"),
    ("char(5)", "'ab'", "ab"),
    ("name", "'n'", "n"),
    ("boolean", "true", True),
    ("integer", "7", 7),
    ("numeric", "19.90", Decimal("19.90")),
    ("numeric", "'Infinity'", Decimal("Infinity")),
    ("float8", "0.1", 0.1),
    ("float4", "0.1", 0.1),
    ("float8", "'-Infinity'", float("-inf")),
    ("uuid", "'00000000-0000-0000-0000-00000000000A'", UUID(int=10)),
    ("date", "'2024-02-29'", date(2024, 2, 29)),
    ("date", "'infinity'", "infinity"),
    ("date", "'0044-03-15 BC'", "0044-03-15 BC"),
    ("timestamp", "'12000-01-01 00:00:01'", "12000-01-01 00:00:01"),
    ("timestamptz", "'2024-01-01 12:00+02'", datetime(2024, 1, 1, 10, tzinfo=UTC)),
    ("timestamptz", "'-infinity'", "-infinity"),
    ("time", "'24:00'", "24:00:00"),
    ("interval", "'1 day 2 hours'", "P1DT2H"),
    ("interval", "'178000000 years'", "P178000000Y"),
    ("json", '\'{"a": [1, "\\ud800"]}\'', {"a": [1, "\ud800"]}),
    ("json", "(repeat('[', 2000) || repeat(']', 2000))::json", "[" * 2000 + "]" * 2000),
    ("jsonb", "to_jsonb(('1' || repeat('0', 5000))::numeric)", JsonNumber("1" + "0" * 5000)),
    ("bytea", "'\\x00ff'", b"\x00\xff"),
    ("money", "12.5", "$12.50"),
    ("inet", "'10.0.0.1'", "10.0.0.1"),
    ("cidr", "'10.0.0.0/8'", "10.0.0.0/8"),
    ("int4range", "'[1,5)'", "[1,5)"),
    ("datemultirange", "'{[2024-01-01,2024-02-01)}'", "{[2024-01-01,2024-02-01)}"),
    ("tsvector", "'a b'", "'a' 'b'"),
    ("point", "'(1,2)'", "(1,2)"),
    ("bit(3)", "'101'", "101"),
    ("hstore", "'a=>1'", '"a"=>"1"'),
    ("vector(2)", "'[1,2]'", "[1,2]"),
    ("citext", "'Ab'", "Ab"),
    ("mood", "'sad'", "sad"),
    ("pair", "'(1,x)'", "(1,x)"),
    ("int[]", "'{1,null,3}'", [1, None, 3]),
    ("text[]", "'{{a,b},{c,d}}'", [["a", "b"], ["c", "d"]]),
    ("mood[]", "'{sad}'", ["sad"]),
    ("inet[]", "'{10.0.0.1}'", ["10.0.0.1"]),
    ("char(3)[]", "'{a}'", ["a"]),
    ("date[]", "'{infinity,2024-01-01}'", ["infinity", date(2024, 1, 1)]),
    ("vector[]", "array['[1,2]']::vector[]", ["[1,2]"]),
    ("oid", "5", 5),
    ("regclass", "'pg_class'", "pg_class"),
    ("text", "null", None),
]


class TestValues:
    @pytest.fixture(autouse=True)
    def _types(self, admin) -> None:
        admin.execute("CREATE EXTENSION citext; CREATE EXTENSION hstore; CREATE EXTENSION vector")
        admin.execute("CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE TYPE pair AS (a int, b text)")

    def test_every_value_arrives_and_has_a_text(self, admin, source: Source) -> None:
        columns = ", ".join(f"c{index} {ddl}" for index, (ddl, _, _) in enumerate(VALUES))
        admin.execute(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
        admin.execute(f"INSERT INTO t VALUES (1, {', '.join(sql for _, sql, _ in VALUES)})")
        names = tuple(f"c{index}" for index in range(len(VALUES)))
        (values,) = values_of(source, "t", *names)
        assert dict(zip(names, values, strict=True)) == {
            name: value for name, (_, _, value) in zip(names, VALUES, strict=True)
        }
        assert [type(value) for value in values] == [type(value) for _, _, value in VALUES]
        reader = source.reader(Selection("t", "id", names))
        assert read_keys(reader, [1])[0].values == values
        assert reader.digest(0).row_count == 1
        assert all(render_value(value) is not None for _, _, value in VALUES[:5])

    def test_nan(self, admin, source: Source) -> None:
        admin.execute(
            "CREATE TABLE t (id int PRIMARY KEY, a float8, b numeric); INSERT INTO t VALUES (1, 'NaN', 'NaN')"
        )
        ((a, b),) = values_of(source, "t", "a", "b")
        assert a != a
        assert b.is_nan()

    def test_a_change_of_scale_or_of_case_is_a_change(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, a numeric, b citext, c bigint)")
        admin.execute("INSERT INTO t VALUES (1, 1.0, 'x', 0)")
        reader = source.reader(Selection("t", "id", ("a", "b", "c")))
        hashes = set()
        # The last two: a hash that folds a bigint into 32 bits takes them for one.
        for change in ("a = 1.0", "a = 1.00", "b = 'X'", f"c = {2**32 + 1}", "c = 0, a = 1"):
            admin.execute(f"UPDATE t SET {change}")
            hashes.add(read_keys(reader, [1])[0].row_hash)
        assert len(hashes) == 5

    def test_filter_types(self, admin, source: Source) -> None:
        keyword, integer, floating, boolean = (
            FilterType.KEYWORD, FilterType.INTEGER, FilterType.FLOAT, FilterType.BOOLEAN,
        )  # fmt: skip
        admin.execute("CREATE DOMAIN years AS numeric(4); CREATE DOMAIN labels AS text[] NOT NULL")
        expected = {
            "smallint": {keyword, integer, floating},
            "numeric": {keyword, floating},
            "numeric(8)": {keyword, integer, floating},
            "numeric(8,2)": {keyword, floating},
            "numeric(3,-2)": {keyword, integer, floating},
            "years": {keyword, integer, floating},
            "real": {keyword, floating},
            "boolean": {keyword, boolean},
            "money": {keyword},
            "varchar(3)": {keyword},
            "citext": {keyword},
            "mood": {keyword},
            "uuid": {keyword},
            "timestamptz": {keyword},
            "inet": {keyword},
            "text[]": set(),
            "labels": set(),
            "jsonb": set(),
            "bytea": set(),
            "vector(3)": set(),
            "hstore": set(),
            "int4range": set(),
            "pair": set(),
        }
        admin.execute(
            f"CREATE TABLE t (id int PRIMARY KEY, {', '.join(f'c{i} {ddl}' for i, ddl in enumerate(expected))})"
        )
        columns = source.describe("t").columns[1:]
        assert {ddl: set(c.filter_types) for ddl, c in zip(expected, columns, strict=True)} == expected
        by_type = {column.type: column for column in columns}
        assert by_type["numeric(8,2)"].nullable
        assert not by_type["labels"].nullable

    def test_texts_and_hashes_do_not_depend_on_anybodys_settings(
        self, admin, source: Source, database_url: str
    ) -> None:
        admin.execute("CREATE TABLE t (id date PRIMARY KEY, a float8, b timestamptz, c interval, d bytea, e money)")
        admin.execute("INSERT INTO t VALUES ('2024-02-03', 1.0/3, '2024-02-03 4:05+00', '1 day 2:03', '\\xff00', 1.5)")
        selection = Selection("t", "id", tuple("abcde"))
        expected = read_keys(source.reader(selection), [date(2024, 2, 3)])
        assert len(expected) == 1
        admin.execute(
            f"""DO $$ BEGIN
            EXECUTE 'ALTER DATABASE {admin.info.dbname} SET TimeZone = ''Asia/Tokyo''';
            EXECUTE 'ALTER DATABASE {admin.info.dbname} SET DateStyle = ''SQL, DMY''';
            EXECUTE 'ALTER DATABASE {admin.info.dbname} SET IntervalStyle = ''iso_8601''';
            EXECUTE 'ALTER DATABASE {admin.info.dbname} SET extra_float_digits = ''-5''';
            EXECUTE 'ALTER DATABASE {admin.info.dbname} SET bytea_output = ''escape''';
            END $$"""
        )
        with open_source("postgresql", credentials_of(database_url)) as other:
            assert read_keys(other.reader(selection), [date(2024, 2, 3)]) == expected

    def test_a_function_in_the_search_path_is_not_called(self, admin, source: Source, database_url: str) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'x')")
        expected = source.reader(Selection("t", "id", ("v",))).digest(1).values.tolist()
        admin.execute("CREATE FUNCTION hashtextextended(text, bigint) RETURNS bigint LANGUAGE sql AS 'SELECT 1 / 0'")
        admin.execute("CREATE FUNCTION evil(int, bigint) RETURNS bool LANGUAGE sql AS 'SELECT 1 / 0 = 1'")
        admin.execute("CREATE OPERATOR > (FUNCTION = evil, LEFTARG = int, RIGHTARG = bigint)")
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET search_path = public, pg_catalog")
        with open_source("postgresql", credentials_of(database_url)) as other:
            reader = other.reader(Selection("t", "id", ("v",)))
            assert reader.digest(1).values.tolist() == expected
            assert len(list(reader.read(KeyRange(0, 5), page_rows=5, page_bytes=99))) == 1

    def test_bytes_of_a_database_without_encoding(self, admin, database_url: str) -> None:
        name = f"ascii_{uuid4().hex[:8]}"
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'")
        try:
            url = database_url.rpartition("/")[0] + "/" + name
            with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
                connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text, k text, \"ü\" text DEFAULT 'ü')")
                connection.execute("INSERT INTO t VALUES (1, E'caf\\xe9', 'fine ü'), (2, 'x', E'\\xff')")
            with open_source("postgresql", credentials_of(url)) as source:
                assert values_of(source, "t", "v", "ü") == [("caf\ufffd", "ü"), ("x", "ü")]
                keyed = source.reader(Selection("t", "k", ("v",)))
                assert [row.values for row in read_keys(keyed, ["fine ü"])] == [("caf\ufffd",)]
                with pytest.raises(SourceRejected, match="not valid UTF-8"):
                    list(keyed.read(EVERYTHING, page_rows=9, page_bytes=999))
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def test_wide_rows_do_not_fill_the_memory(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        admin.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 2000) g")
        admin.execute("INSERT INTO t SELECT g, repeat('x', 1000000) FROM generate_series(2001, 2100) g")
        reader = source.reader(Selection("t", "id", ("v",)))
        sizes = [
            (len(page), sum(len(row.values[0]) for row in page))
            for page in reader.read(EVERYTHING, page_rows=1000, page_bytes=4_000_000)
        ]
        assert sum(count for count, _ in sizes) == 2100
        assert max(size for _, size in sizes) <= 5_000_000


class TestRights:
    @pytest.fixture
    def reader_source(self, admin, role: tuple[str, str], database_url: str) -> Iterator[Source]:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text, secret text); INSERT INTO t VALUES (1, 'a', 'b')")
        admin.execute("CREATE SCHEMA hidden; CREATE TABLE hidden.h (id int PRIMARY KEY)")
        with open_source("postgresql", credentials_of(database_url, user=role[0], password=role[1])) as opened:
            yield opened

    def test_a_password_that_breaks_urls(self, reader_source: Source) -> None:
        reader_source.check()

    def test_the_grant_that_is_missing_is_the_resolution(self, admin, role, reader_source: Source) -> None:
        selection = Selection("t", "id", ("v", "secret"))
        assert reader_source.tables(9) == []
        for ask in (
            lambda: reader_source.describe("t"),
            lambda: reader_source.check_key("hidden.h", "id"),
        ):
            with pytest.raises(SourceAccessDenied) as caught:
                ask()
            admin.execute(caught.value.resolution.partition(": ")[2])
            ask()
        assert len(read_keys(reader_source.reader(selection), [1])) == 1
        assert [table.name for table in reader_source.tables(9)] == ["hidden.h", "t"]

    def test_single_columns(self, admin, role, reader_source: Source) -> None:
        admin.execute(f"GRANT SELECT (id, v) ON t TO {role[0]}")
        assert values_of(reader_source, "t", "v") == [("a",)]
        selection = Selection("t", "id", ("secret",))
        with pytest.raises(SourceAccessDenied) as caught:
            reader_source.reader(selection)
        admin.execute(caught.value.resolution.partition(": ")[2])
        reader_source.reader(selection)

    def test_a_right_that_is_taken_away_in_the_middle(self, admin, role, reader_source: Source) -> None:
        admin.execute(f"GRANT SELECT ON t TO {role[0]}")
        reader = reader_source.reader(Selection("t", "id", ("v",)))
        admin.execute(f"REVOKE SELECT ON t FROM {role[0]}")
        with pytest.raises(SourceAccessDenied) as caught:
            reader.count()
        admin.execute(caught.value.resolution.partition(": ")[2])
        assert reader.count() == 1


class TestConnecting:
    def test_a_wrong_password(self, database_url: str) -> None:
        with open_source("postgresql", credentials_of(database_url, password="hunter2")) as source:
            with pytest.raises(SourceAccessDenied) as caught:
                source.check()
        text = repr(vars(caught.value)) + repr(pickle.loads(pickle.dumps(caught.value)))
        assert "hunter2" not in text
        assert "user 'embedd'" in text
        assert "127.0.0.1" in text

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"user": "nobody_here"}, SourceAccessDenied),
            ({"password": ""}, SourceAccessDenied),
            ({"password": None}, SourceAccessDenied),
            ({"database": "no_such_db"}, SourceRejected),
            ({"port": 1}, SourceUnavailable),
            ({"host": "no-such-host.invalid"}, SourceUnavailable),
            ({"ssl_mode": "require"}, SourceRejected),
            ({"host": "169.254.169.254"}, SourceRejected),
        ],
    )
    def test_what_can_be_wrong(self, database_url: str, changes: dict[str, Any], error: type[EmbeddError]) -> None:
        credentials = credentials_of(database_url, **changes)
        with open_source("postgresql", credentials) as source, pytest.raises(error) as caught:
            source.check()
        assert str(next(iter(changes.values()))) in caught.value.message or {"ssl_mode", "password"} & set(changes)
        assert (
            credentials["password"] is None
            or len(credentials["password"]) < 8
            or (credentials["password"] not in repr(vars(caught.value)))
        )

    def test_a_server_that_does_not_answer(self, database_url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            credentials = credentials_of(database_url, port=silent.getsockname()[1])
            with open_source("postgresql", credentials, connect_timeout_seconds=2) as source:
                with pytest.raises(SourceUnavailable):
                    source.check()

    @pytest.mark.parametrize(
        "changes",
        [
            {"host": ""},
            {"host": "a,b"},
            {"host": None},
            {"database": 5},
            {"user": "a\x00b"},
            {"port": "x"},
            {"port": 70000},
            {"port": True},
            {"ssl_mode": "maybe"},
            {"password": 5},
        ],
    )
    def test_malformed_credentials_name_the_field(self, database_url: str, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(changes))):
            open_source("postgresql", credentials_of(database_url, **changes))

    def test_our_own_environment_is_not_used(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGPASSWORD", str(credentials_of(database_url)["password"]))
        monkeypatch.setenv("PGOPTIONS", "-c no_such_setting=1")
        with open_source("postgresql", credentials_of(database_url)) as source:
            source.check()
        with open_source("postgresql", credentials_of(database_url, password="")) as source:
            with pytest.raises(SourceAccessDenied):
                source.check()

    def test_sessions_cannot_write(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY)")
        admin.execute(
            "CREATE FUNCTION write() RETURNS int LANGUAGE sql AS 'INSERT INTO public.t VALUES (1) RETURNING id';"
            "CREATE VIEW v AS SELECT write() AS id"
        )
        with pytest.raises(SourceRejected, match="the statement writes"):
            source.check_key("v", "id")
        assert admin.execute("SELECT count(*) FROM t").fetchone() == (0,)

    def test_connections_are_few_reused_and_closed(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 500)")
        reader = source.reader(Selection("t", "id", ()))
        ours = (
            "SELECT count(*), min(pid), bool_or(state <> 'idle') FROM pg_stat_activity"
            " WHERE application_name = 'embedd' AND datname = current_database()"
        )
        before = admin.execute(ours).fetchone()
        for page in reader.read(EVERYTHING, page_rows=50, page_bytes=2**20):
            assert page
            assert admin.execute(ours).fetchone() == before  # the same one, and idle between two pages
        threads = [threading.Thread(target=reader.digest, args=(4,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: admin.execute(ours).fetchone()[0] <= 4)  # a session ends a moment after its connection
        source.close()
        wait_until(lambda: admin.execute(ours).fetchone()[0] == 0)


class TestInterruptions:
    @pytest.fixture
    def kill(self, admin) -> Callable[[], None]:
        def kill_all() -> None:
            admin.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'embedd' AND datname = current_database()"
            )

        return kill_all

    def test_a_connection_lost_between_two_pages_is_replaced(self, admin, source: Source, kill) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 30)")
        keys = []
        for page in source.reader(Selection("t", "id", ())).read(EVERYTHING, page_rows=10, page_bytes=999):
            keys += [row.key for row in page]
            kill()
        assert keys == list(range(1, 31))

    def test_a_connection_lost_within_a_page_is_an_error_and_not_an_end(self, admin, source: Source, kill) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 3)")
        # stable, or the view could not be read by the table's index
        admin.execute("CREATE FUNCTION nap() RETURNS text STABLE LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(30); END'")
        admin.execute("CREATE VIEW v AS SELECT id, CASE WHEN id > 2 THEN nap() END AS v FROM t")
        reader = source.reader(Selection("v", "id", ("v",)))
        pages = reader.read(EVERYTHING, page_rows=2, page_bytes=999)
        assert [row.key for row in next(pages)] == [1, 2]
        killer = threading.Timer(0.5, kill)
        killer.start()
        with pytest.raises(SourceUnavailable):
            next(pages)
        killer.join()
        admin.execute("CREATE OR REPLACE VIEW v AS SELECT id, ''::text AS v FROM t")
        assert [[row.key for row in page] for page in reader.read(KeyRange(2), page_rows=2, page_bytes=999)] == [[3]]

    def test_the_statement_timeout_says_what_to_do(self, admin, database_url: str) -> None:
        admin.execute("CREATE VIEW v AS SELECT 1 AS id, pg_sleep(30)::text AS v")
        with open_source("postgresql", credentials_of(database_url), statement_timeout_seconds=0.2) as source:
            reader = source.reader(Selection("v", "id", ("v",)))
            with pytest.raises(SourceUnavailable, match="statement timeout") as caught:
                reader.digest(0)
        assert "statement timeout" in caught.value.resolution

    def test_a_value_that_the_server_cannot_compute_is_not_quoted(self, admin, source: Source) -> None:
        admin.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'my secret')")
        admin.execute("CREATE VIEW v AS SELECT id, v::int AS v FROM t")
        with pytest.raises(SourceRejected) as caught:
            values_of(source, "v", "v")
        assert "secret" not in repr(vars(caught.value))
        assert "InvalidTextRepresentation" in caught.value.message


class TestErrors:
    SERVER = Server("db.example", 5432, "shop", "ann")

    def test_every_state_is_one_of_ours(self) -> None:
        assert len(psycopg_errors._sqlcodes) > 200
        for state, kind in psycopg_errors._sqlcodes.items():
            error = kind("the value (secret) is bad\nDETAIL: Key (id)=(secret)")
            for relation in (None, '"public"."t"'):
                found = translate(error, self.SERVER, relation=relation)
                assert isinstance(
                    found, SourceUnavailable | SourceAccessDenied | SourceTableNotFound | SourceRejected
                ), state
                assert "secret" not in repr(vars(found)), state

    @pytest.mark.parametrize(
        ("state", "expected"),
        [
            ("08006", SourceUnavailable),
            ("28P01", SourceAccessDenied),
            ("28000", SourceAccessDenied),
            ("3D000", SourceRejected),
            ("40001", SourceUnavailable),
            ("42501", SourceAccessDenied),
            ("42P01", SourceTableNotFound),
            ("42703", SourceTableNotFound),
            ("53300", SourceUnavailable),
            ("57014", SourceUnavailable),
            ("57P01", SourceUnavailable),
            ("57P03", SourceUnavailable),
            ("57P04", SourceRejected),
            ("22012", SourceRejected),
            ("25006", SourceRejected),
        ],
    )
    def test_each_state_becomes_one_of_our_errors(self, state: str, expected: type[EmbeddError]) -> None:
        assert type(translate(psycopg_errors.lookup(state)("x"), self.SERVER)) is expected

    @pytest.mark.parametrize("error", [psycopg.OperationalError, psycopg.InterfaceError])
    def test_a_lost_connection_has_no_state(self, error: type[Exception]) -> None:
        assert type(translate(error("server closed the connection"), self.SERVER)) is SourceUnavailable
