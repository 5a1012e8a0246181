"""Changes of types alter the text of rows without changing a row: the table is newly subscribed, and compared."""

from __future__ import annotations

import pytest

from embedd_dagster.protocols.cdc import CdcStream
from embedd_dagster.protocols.source import Selection, Source
from tests.support.cdc_source import Admin, StreamReader, T

_MOOD = "CREATE TYPE mood AS ENUM ('new', 'old')"
_MADE = {
    "an enum": (_MOOD, "mood", "'new'"),
    "an array of an enum": (_MOOD, "mood[]", "'{new}'"),
    "a domain over an enum": (f"{_MOOD}; CREATE DOMAIN d AS mood", "d", "'new'"),
    "an array of a domain over an enum": (f"{_MOOD}; CREATE DOMAIN d AS mood", "d[]", "'{new}'"),
    "a range of an enum": (f"{_MOOD}; CREATE TYPE r AS RANGE (SUBTYPE = mood)", "r", "'[new,old]'"),
    "a multirange of an enum": (
        f"{_MOOD}; CREATE TYPE r AS RANGE (SUBTYPE = mood, MULTIRANGE_TYPE_NAME = rs)",
        "rs",
        "'{[new,old]}'",
    ),
    "a composite type with an enum": (f"{_MOOD}; CREATE TYPE c AS (a int, m mood)", "c", "'(1,new)'"),
    "the row type of a table with an enum": (f"{_MOOD}; CREATE TABLE c (a int, m mood)", "c", "'(1,new)'"),
}


def _made(admin: Admin, feed: CdcStream, types: str, column: str, value: str) -> StreamReader:
    admin.execute(f"{types}; CREATE TABLE t (id int PRIMARY KEY, v {column}); INSERT INTO t VALUES (1, {value})")
    stream_reader = StreamReader(feed, T)
    assert stream_reader.subscribe().newly_subscribed == {T}
    assert stream_reader.subscribe().newly_subscribed == set()
    return stream_reader


def _text(source: Source) -> object:
    (page,) = source.reader(Selection("t", "id", ("v",))).read_keys([1], page_bytes=1000)
    return page[0].values[0]


@pytest.mark.parametrize("made", _MADE.values(), ids=list(_MADE))
def test_a_renamed_enum_label_makes_the_tables_of_its_type_join_again(
    admin: Admin, source: Source, feed: CdcStream, made: tuple[str, str, str]
) -> None:
    stream_reader = _made(admin, feed, *made)
    before = _text(source)
    admin.execute("ALTER TYPE mood RENAME VALUE 'new' TO 'fresh'")
    assert _text(source) != before
    assert stream_reader.read()[-1].keys == {}, "the log says nothing of it"
    assert stream_reader.subscribe().newly_subscribed == {T}
    assert stream_reader.subscribe().newly_subscribed == set()


def test_a_label_that_was_renamed_and_is_what_it_was_makes_the_table_join_again(admin: Admin, feed: CdcStream) -> None:
    stream_reader = _made(admin, feed, _MOOD, "mood", "'new'")
    admin.execute("ALTER TYPE mood RENAME VALUE 'new' TO 'fresh'")
    admin.execute("ALTER TYPE mood RENAME VALUE 'fresh' TO 'new'")
    assert stream_reader.subscribe().newly_subscribed == {T}, "a row may have been read meanwhile"


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TYPE mood ADD VALUE 'ancient'",
        "ALTER TYPE mood RENAME TO humour",
        "ALTER TABLE t ADD COLUMN w mood",
        "CREATE TYPE other AS ENUM ('new'); ALTER TYPE other RENAME VALUE 'new' TO 'fresh'",
        "ALTER TABLE t ADD COLUMN g int GENERATED ALWAYS AS (id + 1) VIRTUAL",
    ],
)
def test_what_changes_no_text_does_not_make_a_table_join_again(admin: Admin, feed: CdcStream, statement: str) -> None:
    stream_reader = _made(admin, feed, _MOOD, "mood", "'new'")
    admin.execute(statement)
    assert stream_reader.subscribe().newly_subscribed == set()


@pytest.mark.parametrize("statement", ["ALTER TYPE c ADD ATTRIBUTE z int", "ALTER TYPE c DROP ATTRIBUTE b"])
def test_another_attribute_of_a_composite_type_makes_its_tables_join_again(
    admin: Admin, source: Source, feed: CdcStream, statement: str
) -> None:
    stream_reader = _made(admin, feed, "CREATE TYPE c AS (a int, b int)", "c[]", """'{"(1,2)"}'""")
    before = _text(source)
    admin.execute(statement)
    assert _text(source) != before
    assert stream_reader.subscribe().newly_subscribed == {T}
    assert stream_reader.subscribe().newly_subscribed == set()


def test_another_expression_of_a_virtual_column_makes_the_table_join_again(
    admin: Admin, source: Source, feed: CdcStream, name: str
) -> None:
    options = "publish_via_partition_root = true, publish_generated_columns = stored"
    admin.execute(f"CREATE PUBLICATION {name} FOR ALL TABLES WITH ({options})")
    stream_reader = _made(admin, feed, "SELECT 1", "int GENERATED ALWAYS AS (id + 1) VIRTUAL", "DEFAULT")
    assert _text(source) == 2
    admin.execute("ALTER TABLE t ALTER COLUMN v SET EXPRESSION AS (id + 2)")
    assert _text(source) == 3
    assert stream_reader.subscribe().newly_subscribed == {T}
    assert stream_reader.subscribe().newly_subscribed == set()


def test_another_output_function_of_a_type_makes_its_tables_join_again(
    admin: Admin, source: Source, feed: CdcStream
) -> None:
    make_function = "CREATE FUNCTION own_{kind}({of}) RETURNS {to} LANGUAGE internal STRICT IMMUTABLE AS '{name}'"
    own_type = "; ".join(
        [
            "CREATE TYPE own",
            make_function.format(kind="in", of="cstring", to="own", name="int4in"),
            make_function.format(kind="out", of="own", to="cstring", name="int4out"),
            "CREATE TYPE own (INPUT = own_in, OUTPUT = own_out, LIKE = int4)",
        ]
    )
    stream_reader = _made(admin, feed, own_type, "own", "'65'")
    assert _text(source) == "65"
    replaced = make_function.format(kind="out", of="own", to="cstring", name="charout")
    admin.execute(replaced.replace("CREATE", "CREATE OR REPLACE", 1))
    assert _text(source) == "A"
    assert stream_reader.subscribe().newly_subscribed == {T}


def test_shapes_that_were_kept_before_meanings_were_are_no_reason_to_join_again(admin: Admin, feed: CdcStream) -> None:
    stream_reader = _made(admin, feed, _MOOD, "mood", "'new'")
    stream_reader.fingerprints = {
        T: {name: value for name, value in stream_reader.fingerprints[T].items() if name != "meanings"}
    }
    assert stream_reader.subscribe().newly_subscribed == set()
    admin.execute("ALTER TYPE mood RENAME VALUE 'new' TO 'fresh'")
    assert stream_reader.subscribe().newly_subscribed == {T}
