"""A catalog that has been in use: thousands of vector tables and their tasks, written by the server itself."""

from __future__ import annotations

import psycopg

# every hundredth table awaits a re-backfill, every thousandth is being deleted, or has a live task; the rest is settled
_TABLES = """
INSERT INTO vector_tables (
    id, org_id, environment_id, connection_id, embedding_provider_id, name, source_table, primary_key_column, columns,
    embedding_model, embedding_dimensions, mode, sync_mode, config_version, storage_name, partition_key, sync_status, paused,
    live_version, total_rows, synced_rows, last_sync_at, next_sync_at, deleted_at, created_at, updated_at)
SELECT 'vt_' || lpad(n::text, 26, '0'), e.org_id, e.id, 'conn_many', 'ep_many', 'table ' || n, 'public.t' || n, 'id',
    %(columns)s::jsonb, 'text-embedding-3-small', 384, 'managed', 'batch', CASE WHEN n %% 100 = 1 THEN 2 ELSE 1 END,
    'vt_' || lpad(n::text, 8, '0') || '_table', 'vt_' || lpad(n::text, 8, '0') || '_table',
    CASE WHEN n %% 1000 = 3 THEN 'deleting' WHEN n %% 1000 = 2 THEN 'backfilling' WHEN n %% 100 = 1 THEN 'pending_rebackfill'
        ELSE 'synced' END,
    false, 1, 1000, 1000, now() - interval '10 minutes', now() + make_interval(secs => n %% 3600 - 30),
    CASE WHEN n %% 1000 = 3 THEN now() END, now() - make_interval(secs => n), now()
FROM generate_series(%(first)s::bigint, %(last)s::bigint) n, environments e WHERE e.name = 'prod'"""

_SETS = """
INSERT INTO vector_sets (vector_table_id, version, state, config_version, configuration, key_type, digest_bits, digest,
    row_count, skipped_count, created_at, live_at)
SELECT id, 1, 'live', 1, jsonb_build_object('source_table', source_table, 'primary_key_column', 'id', 'columns', columns,
    'embedding_model', embedding_model, 'embedding_dimensions', 384, 'embedding_provider_id', 'ep_many'), 'bigint', 4,
    decode(repeat('00', 128), 'hex'), 1000, 0, now(), now()
FROM vector_tables v WHERE connection_id = 'conn_many'
    AND NOT EXISTS (SELECT FROM vector_sets s WHERE s.vector_table_id = v.id)"""

_STATES = """
INSERT INTO cdc_states (vector_table_id) SELECT id FROM vector_tables ON CONFLICT DO NOTHING"""

_TASKS = """
INSERT INTO tasks (id, org_id, environment_id, target_id, task_type, status, progress, options, attempts, max_attempts,
    cancel_requested, created_at, ended_at)
SELECT 'task_' || lpad((10 * n + k)::text, 26, '0'), v.org_id, v.environment_id, v.id, 'sync',
    CASE WHEN n %% 1000 = 2 AND k = 0 THEN 'pending' ELSE 'completed' END, '{}', '{}', 1, 3, false,
    now() - make_interval(secs => n, hours => k), now()
FROM generate_series(%(first)s::bigint, %(last)s::bigint) n
    JOIN vector_tables v ON v.id = 'vt_' || lpad(n::text, 26, '0'), generate_series(0, 2) k"""

_ENDPOINTS = """
INSERT INTO connections (id, org_id, environment_id, name, provider, mode, status, settings, credentials, created_at,
    updated_at)
SELECT 'conn_many', org_id, id, 'many', 'postgresql', 'managed', 'connected', '{}', '', now(), now()
FROM environments WHERE name = 'prod' ON CONFLICT DO NOTHING;
INSERT INTO embedding_providers (id, org_id, environment_id, name, provider, credentials, limits, created_at, updated_at)
SELECT 'ep_many', org_id, id, 'many', 'openai', '', '{}', now(), now()
FROM environments WHERE name = 'prod' ON CONFLICT DO NOTHING"""

_COLUMNS = """[{"name": "title", "role": "embedding", "ordinal": 1, "name_prefix": "title: "},
    {"name": "body", "role": "embedding", "ordinal": 2},
    {"name": "category", "role": "metadata", "filter_type": "keyword"},
    {"name": "price", "role": "metadata", "filter_type": "float"}]"""


def vector_table_id(number: int) -> str:
    """The id of one of the tables."""
    return f"vt_{number:026d}"


def fill_catalog(database_url: str, first: int, last: int) -> None:
    """The tables numbered `first` to `last` in the environment `prod` of a migrated catalog: 0.1 s a thousand."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_ENDPOINTS)
        numbers = {"first": first, "last": last}
        connection.execute(_TABLES, {**numbers, "columns": _COLUMNS})
        connection.execute(_STATES)
        connection.execute(_SETS)
        connection.execute(_TASKS, numbers)
        connection.execute("VACUUM ANALYZE")
