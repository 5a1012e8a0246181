"""Settings that an administrator has given to our role: what must hold in spite of them, and what advice has to respect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest

from embedd_dagster.connectors.registry import open_platform_store, open_source
from embedd_dagster.core.rows import PointBatch, VectorSet
from embedd_dagster.errors import SourceAccessDenied, VectorStoreRejected
from tests.support.cdc_source import T, credentials_of, refusal

Admin = psycopg.Connection[Any]


@pytest.fixture
def admin(database_url: str) -> Iterator[Admin]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE EXTENSION vector")
        yield connection


@pytest.fixture
def role(admin: Admin) -> Iterator[str]:
    name = f"login_{uuid4().hex[:8]}"
    admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'word'; CREATE ROLE {name}_acts; GRANT {name}_acts TO {name}")
    yield name
    for one in (name, f"{name}_acts"):
        admin.execute(f"DROP OWNED BY {one}; DROP ROLE {one}")


def test_advice_names_the_role_whose_rights_count(admin: Admin, role: str, database_url: str) -> None:
    admin.execute(f"ALTER ROLE {role} SET role = '{role}_acts'")
    credentials = credentials_of(database_url, user=role, password="word")
    with open_source("postgresql", credentials) as source:
        with pytest.raises(SourceAccessDenied) as denied:
            source.describe("t")
        assert f'TO "{role}_acts";' in denied.value.resolution
        admin.execute(f"GRANT SELECT ON t TO {role}_acts")
        source.describe("t")
        assert f'ALTER ROLE "{role}_acts" REPLICATION' in refusal(source, T).resolution
    with open_platform_store("postgresql", credentials) as store:
        with pytest.raises(SourceAccessDenied) as denied:
            store.check()
        assert f'TO "{role}_acts";' in denied.value.resolution


def test_a_platform_role_that_is_read_only_by_default_can_write(admin: Admin, role: str, database_url: str) -> None:
    for setting in ("default_transaction_read_only = on", "default_transaction_isolation = serializable"):
        admin.execute(f"ALTER ROLE {role} SET {setting}")
    admin.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    vector_set = VectorSet("vt_" + "c" * 26, 1, "vt_cccccccc_t", 4, {}, "integer")
    points = PointBatch([1], ["x"], [{}], [1], [2], [0], np.ones((1, 4), dtype=np.float32))
    with open_platform_store("postgresql", credentials_of(database_url, user=role, password="word")) as store:
        store.check()
        store.create(vector_set)
        store.upsert(vector_set, points)
        store.finish_load(vector_set)
        store.publish(vector_set)
        assert store.count(vector_set) == 1
        store.drop(vector_set.vector_table_id, 1)


def test_an_empty_search_path_leaves_qualified_names_and_says_what_is_missing(
    admin: Admin, role: str, database_url: str
) -> None:
    admin.execute(f"ALTER ROLE {role} SET search_path = ''; GRANT SELECT ON t TO {role}")
    admin.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    credentials = credentials_of(database_url, user=role, password="word")
    with open_source("postgresql", credentials) as source:
        assert [table.name for table in source.tables(10)] == ["public.t"]
        assert source.describe("public.t").name == "public.t"
    with open_platform_store("postgresql", credentials) as store:
        with pytest.raises(VectorStoreRejected, match="search path") as caught:
            store.check()
        assert f'ALTER ROLE "{role}" SET search_path' in caught.value.resolution
    with open_platform_store("postgresql", credentials, schema="public") as store:
        store.check()
