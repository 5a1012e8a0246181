"""Rows that the platform's database cannot hold are failed rows; the others are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest

from embedd_dagster.catalog import connections, failed_rows, vector_tables
from embedd_dagster.connectors.postgresql.credentials_model import PostgresqlCredentials
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.core.vector_table import Column, ColumnRole, Mode
from embedd_dagster.engine import validation
from embedd_dagster.errors import SourceTableNotFound, ValidationFailed
from embedd_dagster.stack.postgres import EmbeddedPostgres
from tests.engine.conftest import COLUMNS, Product

pytestmark = pytest.mark.parametrize("product", [Mode.PLATFORM], indirect=True, ids=["pgvector"])

CHINESE = '{"name": "\\u4e2d"}'  # plain ASCII in the table, a character of its own when it is read


@pytest.fixture
def latin1(product: Product, postgres: EmbeddedPostgres) -> Iterator[Product]:
    """The customer's table in a database of encoding LATIN1, apart from the catalog."""
    name, catalog_url = f"latin1_{uuid4().hex[:8]}", product.database_url
    product.sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0")
    with product.runtime.catalog.transaction() as session:
        connection = connections.get(session, product.environment_id, product.connection().id, lock=True)
        credentials = dict(connections.open_credentials(connection, product.runtime.box))
        elsewhere = PostgresqlCredentials(**{**credentials, "database": name})
        connections.set_credentials(connection, product.runtime.box, elsewhere.model_dump())
        connections.record_test(connection, None)
    product.database_url = postgres.url(name)
    product.sql(
        """CREATE TABLE products (id integer PRIMARY KEY, title text, body json, category text, price numeric(10,2));
        INSERT INTO products SELECT n, 'Stück ' || n, to_json('the body of ' || n), 'red', n FROM generate_series(1, 300) n"""
    )
    yield product
    with psycopg.connect(catalog_url, autocommit=True) as server:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_rows_with_characters_that_the_encoding_lacks_are_failed_rows(latin1: Product) -> None:
    latin1.sql("UPDATE products SET body = %s::json WHERE id IN (17, 211)", CHINESE)
    report = latin1.run()
    assert (report.point_count, report.rows_failed, report.rows_embedded) == (298, 2, 298)
    assert sorted(latin1.failed_keys()) == [17, 211]
    with latin1.runtime.catalog.transaction() as session:
        failed = failed_rows.page(session, latin1.vector_table_id, 1, None).items[0]
    assert (failed.step, failed.code) == ("write", "value_out_of_range")
    assert "encoding does not have one of the characters" in failed.message
    assert latin1.table().sync_status == SyncStatus.SYNCED
    latin1.assert_true_to_source(without=(17, 211))


def test_a_filter_by_a_text_that_the_database_cannot_hold_matches_no_row(latin1: Product) -> None:
    latin1.run()
    assert latin1.search("Stück 1", filters={"category": {"eq": "中"}}) == []
    given: dict[str, object]
    for given in (
        {"category": {"ne": "中"}},
        {"category": {"in": ["中", "red"]}},
        {"$or": [{"category": "中"}, {"price": 3}]},
    ):
        hits = latin1.search("Stück 1", filters=given)
        assert len(hits) == (1 if "$or" in given else 10), given


def test_a_row_that_becomes_unholdable_loses_its_point_and_gets_it_back(latin1: Product) -> None:
    latin1.run()
    latin1.sql("UPDATE products SET body = %s::json WHERE id = 17; ".replace("%s", f"'{CHINESE}'"))
    latin1.sql("UPDATE products SET title = 'good' WHERE id BETWEEN 15 AND 20")
    latin1.run(TaskType.SYNC)
    assert latin1.failed_keys() == [17]
    latin1.assert_true_to_source(without=[17])
    latin1.sql("UPDATE products SET body = '\"plain\"' WHERE id = 17")
    latin1.run(TaskType.SYNC)
    assert latin1.failed_keys() == []
    latin1.assert_true_to_source()


def test_a_table_name_that_the_database_cannot_hold_is_not_found(latin1: Product) -> None:
    with latin1.runtime.open_source(latin1.connection()) as source:
        with pytest.raises(SourceTableNotFound, match="encoding lacks"):
            source.describe("产品")
        assert source.describe("products").name == "products"


def test_a_name_prefix_that_the_database_cannot_hold_is_refused(latin1: Product) -> None:
    with latin1.runtime.catalog.transaction() as session:
        table = vector_tables.get(session, latin1.environment_id, latin1.vector_table_id)
        provider = table.embedding_provider_id
    old = replace(latin1.table().configuration, columns=(COLUMNS[0],), embedding_provider_id=provider)
    for prefix, says in (("标题: ", r"columns\[1\]\.name_prefix: .*encoding"), ("Größe: ", "")):
        new = replace(old, columns=(COLUMNS[0], Column("body", ColumnRole.EMBEDDING, name_prefix=prefix, ordinal=2)))
        if says:
            with pytest.raises(ValidationFailed, match=says):
                validation.admit_change(latin1.runtime, latin1.connection(), None, old, new)
        else:
            validation.admit_change(latin1.runtime, latin1.connection(), None, old, new)
