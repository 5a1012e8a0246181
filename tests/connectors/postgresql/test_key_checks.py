"""A key is proved by a constraint on exactly this column, otherwise by counting; a value that two rows have is named."""

from __future__ import annotations

import pytest

from embedd_dagster.core.shards import KeyRange
from embedd_dagster.errors import SourceRejected
from embedd_dagster.protocols.source import Selection, Source
from tests.support.cdc_source import Admin


def keys_of(source: Source, table: str) -> list[object]:
    reader = source.reader(Selection(table, "id", ()))
    return [row.key for page in reader.read(KeyRange(), page_rows=100, page_bytes=2**20) for row in page]


@pytest.mark.parametrize(
    ("ddl", "message"),
    [
        (
            ("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE heir () INHERITS (t); INSERT INTO t VALUES (1), (2);"
             "INSERT INTO heir VALUES (2), (3)"),
            "1 row repeats another's value, such as '2'",
        ),
        (
            "CREATE TABLE t (id int, n int, PRIMARY KEY (id, n)); INSERT INTO t VALUES (7, 1), (7, 2), (7, 3), (8, 1)",
            "2 rows repeat another's value, such as '7'",
        ),
        ("CREATE TABLE t (id text); INSERT INTO t SELECT repeat('x', 500) FROM generate_series(1, 2)", "such as 'x{80}…'"),
        ("CREATE TYPE size AS ENUM ('s', 'm'); CREATE TABLE t (id size); INSERT INTO t VALUES ('m'), ('m')", "such as 'm'"),
        ("CREATE TABLE t (id date); INSERT INTO t VALUES ('infinity'), ('infinity')", "such as 'infinity'"),
        (
            ("CREATE TABLE b (id int, n int, PRIMARY KEY (id, n)) PARTITION BY LIST (n);"
             "CREATE TABLE b1 PARTITION OF b FOR VALUES IN (1); CREATE TABLE b2 PARTITION OF b FOR VALUES IN (2);"
             "INSERT INTO b VALUES (5, 1), (5, 2); CREATE VIEW t AS SELECT id FROM b"),
            "such as '5'",
        ),
    ],
)  # fmt: skip
def test_a_value_that_two_rows_have_is_named(admin: Admin, source: Source, ddl: str, message: str) -> None:
    admin.execute(ddl)
    for check in (lambda: source.check_key("t", "id"), source.reader(Selection("t", "id", ())).check_keys):
        with pytest.raises(SourceRejected, match=message) as caught:
            check()
        assert "make a view" in caught.value.resolution


@pytest.mark.parametrize(
    "ddl",
    [
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)",
        "CREATE TABLE t (id int, n int, PRIMARY KEY (id, n)); INSERT INTO t VALUES (1, 1), (2, 1)",
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE heir () INHERITS (t); INSERT INTO heir VALUES (2), (3)",
        "CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY LIST (id); CREATE TABLE p PARTITION OF t DEFAULT",
    ],
)
def test_a_column_that_tells_all_rows_apart_is_a_key(admin: Admin, source: Source, ddl: str) -> None:
    admin.execute(ddl)
    source.check_key("t", "id")
    source.reader(Selection("t", "id", ())).check_keys()


def test_an_inheriting_table_that_allows_nulls_is_seen(admin: Admin, source: Source) -> None:
    admin.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v int); CREATE TABLE heir (id int, v int); INSERT INTO heir VALUES (1)"
    )
    version = admin.info.server_version
    admin.execute("ALTER TABLE heir INHERIT t" if version < 180000 else "ALTER TABLE heir ALTER id SET NOT NULL")
    if version >= 180000:
        admin.execute(
            "ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ALTER id DROP NOT NULL; ALTER TABLE heir ALTER id DROP NOT NULL;"
            "ALTER TABLE t ADD CONSTRAINT own NOT NULL id NO INHERIT; CREATE UNIQUE INDEX ON t (id);"
            "ALTER TABLE heir INHERIT t"
        )
    admin.execute("INSERT INTO heir VALUES (null)")
    with pytest.raises(SourceRejected, match="1 row has no value"):
        source.check_key("t", "id")
    assert keys_of(source, "t") == [1]


def test_a_constraint_that_was_not_validated_proves_nothing(admin: Admin, source: Source) -> None:
    if admin.info.server_version < 180000:
        pytest.skip("NOT NULL … NOT VALID is of PostgreSQL 18")
    admin.execute(
        "CREATE TABLE t (id int UNIQUE); INSERT INTO t VALUES (1), (null); ALTER TABLE t ADD NOT NULL id NOT VALID"
    )
    with pytest.raises(SourceRejected, match="1 row has no value"):
        source.check_key("t", "id")
    assert keys_of(source, "t") == [1]


def test_nulls_of_a_domain_without_them_are_left_out(admin: Admin, source: Source) -> None:
    admin.execute(
        "CREATE DOMAIN number AS int NOT NULL; CREATE TABLE a (id number PRIMARY KEY); INSERT INTO a VALUES (1);"
        "CREATE VIEW t AS SELECT a.id FROM generate_series(1, 2) g LEFT JOIN a ON a.id = g"
    )
    with pytest.raises(SourceRejected, match="1 row has no value"):
        source.check_key("t", "id")
    assert keys_of(source, "t") == [1]
