"""What every source must do, over every backend there is. A new backend adds itself to `_BACKENDS`; SQL here is portable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from embedd_dagster.connectors.registry import open_source, registered, sources
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import SourceRow
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.vector_table import FilterType
from embedd_dagster.errors import ConfigurationError, SourceRejected, SourceTableNotFound, SourceUnavailable
from embedd_dagster.protocols.source import Selection, Source, TableReader
from tests.support.toy_connector.database import create_database
from tests.support.toy_connector.spec import SPEC

ITEMS = Selection("items", "id", ("name", "price"))
EVERYTHING = KeyRange()


@dataclass
class Backend:
    """A source, and a way to write to what it reads."""

    source: Source
    run: Callable[..., object]

    def reader(self, selection: Selection = ITEMS) -> TableReader:
        return self.source.reader(selection)

    def fill(self, count: int) -> None:
        """Items with the ids 10, 20, 30, …"""
        values = ", ".join(f"({index * 10}, 'item {index}', {index}.50)" for index in range(1, count + 1))
        self.run(f"INSERT INTO items VALUES {values}")


@pytest.fixture
def postgresql(database_url: str) -> Iterator[Backend]:
    parts = conninfo_to_dict(database_url)
    credentials = {
        "host": parts["host"],
        "port": int(str(parts["port"])),
        "database": parts["dbname"],
        "user": parts["user"],
        "password": parts["password"],
    }
    with (
        psycopg.connect(database_url, autocommit=True) as connection,
        open_source("postgresql", credentials) as source,
    ):
        yield Backend(source, connection.execute)


@pytest.fixture
def toy() -> Iterator[Backend]:
    database = create_database("contract", "token")
    with registered(SPEC), open_source("toy", {"database": "contract", "token": "token"}) as source:
        yield Backend(source, database.execute)


_BACKENDS = ("postgresql", "toy")


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    found.run("CREATE TABLE items (id integer PRIMARY KEY, name varchar(200), price numeric(10, 2))")
    return found


def read(reader: TableReader, key_range: KeyRange = EVERYTHING, *, page_rows: int = 100) -> list[SourceRow]:
    return [row for page in reader.read(key_range, page_rows=page_rows, page_bytes=2**20) for row in page]


def read_keys(reader: TableReader, keys: list[Key]) -> list[SourceRow]:
    return [row for page in reader.read_keys(keys, page_bytes=2**20) for row in page]


def test_every_provider_is_under_contract() -> None:
    assert set(_BACKENDS) == {*sources(), "toy"}


def test_an_unknown_provider_names_those_known() -> None:
    with pytest.raises(ConfigurationError, match="oracle") as caught:
        open_source("oracle", {})
    assert "postgresql" in caught.value.resolution


def test_check_and_tables(backend: Backend) -> None:
    backend.run("CREATE VIEW cheap AS SELECT id, name FROM items WHERE price < 5")
    backend.run("CREATE TABLE another (id integer PRIMARY KEY)")
    backend.source.check()
    assert [(table.name, table.is_view) for table in backend.source.tables(10)] == [
        ("another", False),
        ("cheap", True),
        ("items", False),
    ]
    assert [table.name for table in backend.source.tables(2)] == ["another", "cheap"]


def test_describe(backend: Backend) -> None:
    table = backend.source.describe("items")
    assert table.name == "items"
    assert [column.name for column in table.columns] == ["id", "name", "price"]
    assert [column.nullable for column in table.columns] == [False, True, True]
    assert all(column.is_key_type for column in table.columns)
    number = {FilterType.KEYWORD, FilterType.FLOAT}
    assert [column.filter_types for column in table.columns] == [
        number | {FilterType.INTEGER},
        {FilterType.KEYWORD},
        number,
    ]


def test_a_missing_table_is_named_with_what_is_near(backend: Backend) -> None:
    for ask in (
        lambda: backend.source.describe("itmes"),
        lambda: backend.source.check_key("itmes", "id"),
        lambda: backend.reader(Selection("itmes", "id", ("name",))),
    ):
        with pytest.raises(SourceTableNotFound, match="itmes") as caught:
            ask()
        assert "items" in caught.value.resolution


def test_all_missing_columns_are_named_with_what_is_near(backend: Backend) -> None:
    with pytest.raises(SourceTableNotFound) as caught:
        backend.reader(Selection("items", "idd", ("name", "prize", "nothing_like_it")))
    assert all(name in caught.value.message for name in ("'idd'", "'prize'", "'nothing_like_it'"))
    assert "'name'" not in caught.value.message
    assert "'price'" in caught.value.resolution


def test_a_key_by_constraint(backend: Backend) -> None:
    backend.source.check_key("items", "id")


def test_a_key_by_the_rows_of_a_view(backend: Backend) -> None:
    backend.run("CREATE VIEW copies AS SELECT id, price FROM items")
    backend.run("INSERT INTO items VALUES (1, 'a', 1), (2, 'b', 1), (3, 'c', 1), (4, 'd', null)")
    backend.source.check_key("copies", "id")
    with pytest.raises(SourceRejected) as caught:
        backend.source.check_key("copies", "price")
    assert "2 rows repeat" in caught.value.message
    assert "1 row has no value" in caught.value.message
    assert "copies" in caught.value.message


def test_pages_are_in_key_order_and_complete(backend: Backend) -> None:
    backend.fill(25)
    pages = list(backend.reader().read(EVERYTHING, page_rows=10, page_bytes=2**20))
    assert [len(page) for page in pages] == [10, 10, 5]
    rows = [row for page in pages for row in page]
    assert [row.key for row in rows] == list(range(10, 260, 10))
    assert rows[0].values == ("item 1", Decimal("1.50"))


def test_an_empty_table_gives_no_page(backend: Backend) -> None:
    reader = backend.reader()
    assert list(reader.read(EVERYTHING, page_rows=10, page_bytes=100)) == []
    assert reader.count() == 0
    assert reader.split(4) == [EVERYTHING]
    digest = reader.digest(3)
    assert (digest.row_count, digest.values.tolist()) == (0, [0] * 8)
    assert list(reader.fingerprints(3, None)) == []


@pytest.mark.parametrize("count", [10, 20])
def test_a_last_full_page_is_not_repeated(backend: Backend, count: int) -> None:
    backend.fill(count)
    assert len(read(backend.reader(), page_rows=10)) == count


def test_a_range_is_open_below_and_closed_above(backend: Backend) -> None:
    backend.fill(10)
    reader = backend.reader()
    assert [row.key for row in read(reader, KeyRange(20, 50), page_rows=2)] == [30, 40, 50]
    assert [row.key for row in read(reader, KeyRange(None, 25))] == [10, 20]
    assert [row.key for row in read(reader, KeyRange(95, None))] == [100]
    assert read(reader, KeyRange(50, 50)) == []


def test_pages_are_bounded_by_bytes(backend: Backend) -> None:
    backend.run("CREATE TABLE wide (id integer PRIMARY KEY, body text)")
    backend.run("INSERT INTO wide VALUES " + ", ".join(f"({i}, '{'x' * 50_000}')" for i in range(40)))
    pages = list(
        backend.reader(Selection("wide", "id", ("body",))).read(EVERYTHING, page_rows=1000, page_bytes=200_000)
    )
    assert [row.key for page in pages for row in page] == list(range(40))
    assert max(len(page) for page in pages) <= 5
    assert len(pages) <= 20


def test_a_row_over_the_page_size_is_a_page(backend: Backend) -> None:
    backend.fill(3)
    pages = list(backend.reader().read(EVERYTHING, page_rows=10, page_bytes=1))
    assert [[row.key for row in page] for page in pages] == [[10], [20], [30]]


def test_shards_cover_every_key_once(backend: Backend) -> None:
    backend.run("CREATE TABLE numbers (id integer PRIMARY KEY, name varchar(20))")
    for start in range(0, 12_000, 4_000):
        backend.run("INSERT INTO numbers VALUES " + ", ".join(f"({i}, 'n')" for i in range(start, start + 4_000)))
    reader = backend.reader(Selection("numbers", "id", ("name",)))
    ranges = reader.split(3)
    assert 2 <= len(ranges) <= 3
    assert ranges[0].lower is None
    assert ranges[-1].upper is None
    with ThreadPoolExecutor(3) as threads:
        parts = list(threads.map(lambda part: [row.key for row in read(reader, part, page_rows=1000)], ranges))
    assert [key for part in parts for key in part] == list(range(12_000))
    assert min(len(part) for part in parts) > 1000


def test_a_small_table_is_one_shard(backend: Backend) -> None:
    backend.fill(10)
    assert backend.reader().split(8) == [EVERYTHING]


def test_read_keys_leaves_out_what_is_not_there(backend: Backend) -> None:
    backend.fill(2000)
    reader = backend.reader()
    assert sorted(read_keys(reader, [20, 10, 15, 2**70, -1, "10", 10])) == read(reader, KeyRange(None, 20))
    assert list(reader.read_keys([], page_bytes=1)) == list(reader.read_keys([15, "10"], page_bytes=1)) == []
    assert len(read_keys(reader, list(range(20_001)))) == 2000


def test_pages_of_keys_are_bounded_by_bytes(backend: Backend) -> None:
    backend.run("CREATE TABLE wide (id integer PRIMARY KEY, body text)")
    backend.run("INSERT INTO wide VALUES " + ", ".join(f"({i}, '{i:05}{'x' * 50_000}')" for i in range(40)))
    reader = backend.reader(Selection("wide", "id", ("body",)))
    pages = reader.read_keys(list(range(30)), page_bytes=200_000)
    backend.run("DROP TABLE wide")  # all of them were read
    rows = [[(row.key, row.values[0][:5], len(row.values[0])) for row in page] for page in pages]
    assert max(map(len, rows)) <= 5
    assert sorted(row for page in rows for row in page) == [(i, f"{i:05}", 50_005) for i in range(30)]


def test_every_way_of_reading_gives_the_same_hash_and_bucket(backend: Backend) -> None:
    backend.fill(300)
    reader = backend.reader()
    by_page = {row.key: (row.row_hash, row.bucket) for row in read(reader)}
    by_key = {row.key: (row.row_hash, row.bucket) for row in read_keys(reader, list(by_page))}
    by_scan = {point.key: (point.row_hash, point.bucket) for point in reader.fingerprints(0, None)}
    assert by_page == by_key == by_scan
    assert len({row_hash for row_hash, _ in by_page.values()}) == 300
    assert all(-(2**63) <= row_hash < 2**63 and 0 <= bucket < 2**16 for row_hash, bucket in by_page.values())


def test_a_digest_shows_in_which_buckets_something_changed(backend: Backend) -> None:
    backend.fill(300)
    reader = backend.reader()
    bucket_of = {row.key: row.bucket >> 12 for row in read(reader)}
    before = reader.digest(4)
    assert before.row_count == 300
    assert set(before.changed_buckets(reader.digest(4)) or []) == set()
    assert {bucket for bucket, value in enumerate(before.values) if value} == set(bucket_of.values())

    backend.run("UPDATE items SET name = 'changed' WHERE id = 10")
    after = reader.digest(4)
    assert after.changed_buckets(before) == [bucket_of[10]]
    backend.run("UPDATE items SET name = 'item 1' WHERE id = 10")
    assert reader.digest(4).changed_buckets(before) == []

    backend.run("DELETE FROM items WHERE id = 20")
    assert reader.digest(4).changed_buckets(before) == [bucket_of[20]]
    assert reader.digest(5).changed_buckets(before) is None


def test_a_digest_shows_two_rows_that_swap_their_values(backend: Backend) -> None:
    backend.fill(2)
    reader = backend.reader()
    before = reader.digest(0)
    backend.run("UPDATE items SET name = CASE id WHEN 10 THEN 'item 2' ELSE 'item 1' END, price = 4.0 - price")
    assert [row.values for row in read(reader)] == [("item 2", Decimal("2.50")), ("item 1", Decimal("1.50"))]
    assert reader.digest(0).changed_buckets(before) == [0]


def test_a_digest_tells_null_from_empty(backend: Backend) -> None:
    backend.run("INSERT INTO items VALUES (1, '', null)")
    reader = backend.reader()
    before = reader.digest(0)
    backend.run("UPDATE items SET name = null")
    assert reader.digest(0).changed_buckets(before) == [0]


def test_a_column_that_is_not_selected_changes_nothing(backend: Backend) -> None:
    backend.fill(3)
    reader = backend.reader(Selection("items", "id", ("name",)))
    before = reader.digest(0)
    backend.run("UPDATE items SET price = 99")
    assert reader.digest(0).changed_buckets(before) == []


def test_fingerprints_of_some_buckets(backend: Backend) -> None:
    backend.fill(300)
    reader = backend.reader()
    expected = {row.key for row in read(reader) if row.bucket >> 13 in (1, 6)}
    assert expected
    assert {point.key for point in reader.fingerprints(3, [1, 6])} == expected
    assert list(reader.fingerprints(3, [])) == []


def test_abandoned_iterations_leave_the_source_usable(backend: Backend) -> None:
    backend.fill(2000)
    reader = backend.reader()
    for _ in range(12):
        with closing(reader.fingerprints(0, None)) as points:  # type: ignore[type-var]
            next(points)
        with closing(reader.read(EVERYTHING, page_rows=10, page_bytes=100)) as pages:  # type: ignore[type-var]
            next(pages)
    assert reader.count() == 2000


def test_a_row_changed_between_two_pages_is_seen_as_it_is_then(backend: Backend) -> None:
    backend.fill(4)
    pages = backend.reader().read(EVERYTHING, page_rows=2, page_bytes=2**20)
    next(pages)
    backend.run("UPDATE items SET name = 'late' WHERE id = 40")  # would hang if a page held a lock
    backend.run("DELETE FROM items WHERE id = 30")
    assert [(row.key, row.values[0]) for row in next(pages)] == [(40, "late")]


def test_a_table_dropped_in_the_middle_is_no_end_of_the_table(backend: Backend) -> None:
    backend.fill(4)
    reader = backend.reader()
    pages = reader.read(EVERYTHING, page_rows=2, page_bytes=2**20)
    next(pages)
    backend.run("DROP TABLE items")
    with pytest.raises(SourceTableNotFound):
        next(pages)
    with pytest.raises(SourceTableNotFound):
        reader.digest(2)
    with pytest.raises(SourceTableNotFound):
        list(reader.fingerprints(2, None))


def test_closing_twice_is_fine_and_using_it_then_is_not(backend: Backend) -> None:
    reader = backend.reader()
    backend.source.close()
    backend.source.close()
    with pytest.raises(SourceUnavailable):
        reader.count()
