"""The catalog as it first was: organizations, environments, keys, connections, providers, vector tables, tasks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "organizations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
        sa.UniqueConstraint("name", name=op.f("uq_organizations_name")),
    )
    op.create_table(
        "environments",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_environments_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environments")),
        sa.UniqueConstraint("org_id", "name", name=op.f("uq_environments_org_id_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("permission", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("revoked_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name=op.f("fk_api_keys_environment_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_api_keys_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_hash", name=op.f("uq_api_keys_key_hash")),
    )
    op.create_index(op.f("ix_api_keys_org_id_created_at_id"), "api_keys", ["org_id", "created_at", "id"], unique=False)
    op.create_table(
        "connections",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("settings", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("credentials", sa.LargeBinary(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("tested_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["environment_id"], ["environments.id"], name=op.f("fk_connections_environment_id")),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_connections_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_connections")),
        sa.UniqueConstraint("environment_id", "name", name=op.f("uq_connections_environment_id_name")),
    )
    op.create_index(
        op.f("ix_connections_environment_id_created_at_id"),
        "connections",
        ["environment_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "embedding_providers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("base_url", sa.Text(), nullable=True),
        sa.Column("credentials", sa.LargeBinary(), nullable=False),
        sa.Column("limits", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name=op.f("fk_embedding_providers_environment_id")
        ),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_embedding_providers_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_embedding_providers")),
        sa.UniqueConstraint("environment_id", "name", name=op.f("uq_embedding_providers_environment_id_name")),
    )
    op.create_index(
        op.f("ix_embedding_providers_environment_id_created_at_id"),
        "embedding_providers",
        ["environment_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=False),
        sa.Column("target_id", sa.Text(), nullable=False),
        sa.Column("task_type", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("options", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("max_attempts", sa.BigInteger(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("dagster_run_id", sa.Text(), nullable=True),
        sa.Column("launched_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("heartbeat_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("started_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ended_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["environment_id"], ["environments.id"], name=op.f("fk_tasks_environment_id")),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_tasks_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
    )
    op.create_index(
        op.f("ix_tasks_environment_id_created_at_id"), "tasks", ["environment_id", "created_at", "id"], unique=False
    )
    op.create_index(
        "ix_tasks_live", "tasks", ["status"], unique=False, postgresql_where=sa.text("status IN ('pending', 'running')")
    )
    op.create_index(op.f("ix_tasks_target_id_created_at_id"), "tasks", ["target_id", "created_at", "id"], unique=False)
    op.create_index(
        "uq_tasks_live_target_id",
        "tasks",
        ["target_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('pending', 'running')"),
    )
    op.create_table(
        "vector_tables",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Text(), nullable=False),
        sa.Column("environment_id", sa.Text(), nullable=False),
        sa.Column("connection_id", sa.Text(), nullable=False),
        sa.Column("embedding_provider_id", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source_table", sa.Text(), nullable=False),
        sa.Column("primary_key_column", sa.Text(), nullable=False),
        sa.Column("columns", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("embedding_model", sa.Text(), nullable=False),
        sa.Column("embedding_dimensions", sa.BigInteger(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("sync_mode", sa.Text(), nullable=False),
        sa.Column("sync_schedule", sa.Text(), nullable=True),
        sa.Column("sync_interval_seconds", sa.BigInteger(), nullable=True),
        sa.Column("config_version", sa.BigInteger(), nullable=False),
        sa.Column("storage_name", sa.Text(), nullable=False),
        sa.Column("platform_vector_ref", sa.Text(), nullable=True),
        sa.Column("sync_status", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("live_version", sa.BigInteger(), nullable=True),
        sa.Column("total_rows", sa.BigInteger(), nullable=False),
        sa.Column("synced_rows", sa.BigInteger(), nullable=False),
        sa.Column("last_sync_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("next_sync_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("last_error_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("deleted_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["connection_id"], ["connections.id"], name=op.f("fk_vector_tables_connection_id")),
        sa.ForeignKeyConstraint(
            ["embedding_provider_id"], ["embedding_providers.id"], name=op.f("fk_vector_tables_embedding_provider_id")
        ),
        sa.ForeignKeyConstraint(["environment_id"], ["environments.id"], name=op.f("fk_vector_tables_environment_id")),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_vector_tables_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_vector_tables")),
        sa.UniqueConstraint("storage_name", name=op.f("uq_vector_tables_storage_name")),
    )
    op.create_index(op.f("ix_vector_tables_connection_id"), "vector_tables", ["connection_id"], unique=False)
    op.create_index(
        op.f("ix_vector_tables_embedding_provider_id"), "vector_tables", ["embedding_provider_id"], unique=False
    )
    op.create_index(
        op.f("ix_vector_tables_environment_id_created_at_id"),
        "vector_tables",
        ["environment_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "ix_vector_tables_next_sync_at",
        "vector_tables",
        ["next_sync_at"],
        unique=False,
        postgresql_where=sa.text("next_sync_at IS NOT NULL"),
    )
    op.create_index(
        "ix_vector_tables_unsettled",
        "vector_tables",
        ["sync_status"],
        unique=False,
        postgresql_where=sa.text("sync_status NOT IN ('synced', 'paused', 'pending', 'error')"),
    )
    op.create_index(
        "uq_vector_tables_environment_id_name",
        "vector_tables",
        ["environment_id", "name"],
        unique=True,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "failed_rows",
        sa.Column("vector_table_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("row_hash", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("first_failed_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("last_failed_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["vector_table_id"], ["vector_tables.id"], name=op.f("fk_failed_rows_vector_table_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("vector_table_id", "version", "key", name=op.f("pk_failed_rows")),
    )
    op.create_table(
        "shards",
        sa.Column("vector_table_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("lower_key", sa.Text(), nullable=True),
        sa.Column("upper_key", sa.Text(), nullable=True),
        sa.Column("last_key", sa.Text(), nullable=True),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.Column("counts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["vector_table_id"], ["vector_tables.id"], name=op.f("fk_shards_vector_table_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("vector_table_id", "version", "ordinal", name=op.f("pk_shards")),
    )
    op.create_table(
        "vector_sets",
        sa.Column("vector_table_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("config_version", sa.BigInteger(), nullable=False),
        sa.Column("configuration", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("key_type", sa.Text(), nullable=True),
        sa.Column("digest_bits", sa.BigInteger(), nullable=True),
        sa.Column("digest", sa.LargeBinary(), nullable=True),
        sa.Column("row_count", sa.BigInteger(), nullable=True),
        sa.Column("skipped_count", sa.BigInteger(), nullable=True),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("live_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("retired_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["vector_table_id"], ["vector_tables.id"], name=op.f("fk_vector_sets_vector_table_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("vector_table_id", "version", name=op.f("pk_vector_sets")),
    )


def downgrade() -> None:
    op.drop_table("vector_sets")
    op.drop_table("shards")
    op.drop_table("failed_rows")
    op.drop_index(
        "uq_vector_tables_environment_id_name",
        table_name="vector_tables",
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.drop_index(
        "ix_vector_tables_unsettled",
        table_name="vector_tables",
        postgresql_where=sa.text("sync_status NOT IN ('synced', 'paused', 'pending', 'error')"),
    )
    op.drop_index(
        "ix_vector_tables_next_sync_at",
        table_name="vector_tables",
        postgresql_where=sa.text("next_sync_at IS NOT NULL"),
    )
    op.drop_index(op.f("ix_vector_tables_environment_id_created_at_id"), table_name="vector_tables")
    op.drop_index(op.f("ix_vector_tables_embedding_provider_id"), table_name="vector_tables")
    op.drop_index(op.f("ix_vector_tables_connection_id"), table_name="vector_tables")
    op.drop_table("vector_tables")
    op.drop_index(
        "uq_tasks_live_target_id", table_name="tasks", postgresql_where=sa.text("status IN ('pending', 'running')")
    )
    op.drop_index(op.f("ix_tasks_target_id_created_at_id"), table_name="tasks")
    op.drop_index("ix_tasks_live", table_name="tasks", postgresql_where=sa.text("status IN ('pending', 'running')"))
    op.drop_index(op.f("ix_tasks_environment_id_created_at_id"), table_name="tasks")
    op.drop_table("tasks")
    op.drop_index(op.f("ix_embedding_providers_environment_id_created_at_id"), table_name="embedding_providers")
    op.drop_table("embedding_providers")
    op.drop_index(op.f("ix_connections_environment_id_created_at_id"), table_name="connections")
    op.drop_table("connections")
    op.drop_index(op.f("ix_api_keys_org_id_created_at_id"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_table("environments")
    op.drop_table("organizations")
