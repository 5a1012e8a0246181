"""Which key a vector table's partition has in Dagster."""

from __future__ import annotations

import pytest
from alembic import command
from dagster._core.definitions.partitions.utils import raise_error_on_invalid_partition_key_substring
from sqlalchemy import create_engine, make_url, text

from embedd_dagster.catalog import migrate
from embedd_dagster.core.vector_table import storage_name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("product-search", "vt_6fw3hw0g_product-search"),
        ("a...b", "vt_6fw3hw0g_a-b"),
        ("a,b/c [d] \"e\" 'f'", "vt_6fw3hw0g_a-b-c-d-e-f"),
        ("tab\tnew\nline\0", "vt_6fw3hw0g_tab-new-line"),
        ("商品", "vt_6fw3hw0g_table"),
        ("x" * 100, "vt_6fw3hw0g_" + "x" * 100),
    ],
)
def test_a_partition_key_is_readable_and_one_that_dagster_takes(name: str, key: str) -> None:
    made = storage_name("vt_6fw3hw0gvtcrsx74d4q57ds3a0", name, max_length=255)
    assert made == key
    raise_error_on_invalid_partition_key_substring([made])


def test_a_vector_table_that_exists_gets_its_storage_name_as_partition_key(database_url: str) -> None:
    config = migrate.alembic_config()
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0008")
        connection.execute(
            text(
                """INSERT INTO organizations VALUES ('org', 'o', now());
                INSERT INTO environments (id, org_id, name, created_at) VALUES ('env', 'org', 'e', now());
                INSERT INTO connections (id, org_id, environment_id, name, provider, mode, status, settings, credentials,
                    created_at, updated_at) VALUES ('c', 'org', 'env', 'c', 'postgresql', 'managed', 'connected', '{}', '',
                    now(), now());
                INSERT INTO vector_tables (id, org_id, environment_id, connection_id, name, source_table,
                    primary_key_column, columns, embedding_model, embedding_dimensions, mode, sync_mode, config_version,
                    storage_name, sync_status, paused, total_rows, synced_rows, created_at, updated_at)
                VALUES ('vt_abc', 'org', 'env', 'c', 'renamed', 't', 'id', '[]', 'm', 3, 'managed', 'batch', 1,
                    'vt_abc_first-name', 'pending', false, 0, 0, now(), now())"""
            )
        )
        connection.commit()
        command.upgrade(config, "head")
        assert connection.execute(text("SELECT partition_key FROM vector_tables")).scalars().all() == [
            "vt_abc_first-name"
        ]
    engine.dispose()
