"""Embedding providers keep the outcome of their last test, keys know whose rate limit they share, lists have filters."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TIMESTAMP

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_FILTERS = ("sync_status", "connection_id", "source_table")


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("embedding_providers", sa.Column("status", sa.Text(), nullable=False, server_default="pending"))
    op.add_column("embedding_providers", sa.Column("last_error", sa.Text(), nullable=True))
    op.add_column("embedding_providers", sa.Column("tested_at", TIMESTAMP(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("rate_limit_key_id", sa.Text(), nullable=True))
    op.create_index("ix_api_keys_name", "api_keys", ["org_id", "name", "created_at", "id"])
    for column in _FILTERS:
        op.create_index(
            f"ix_vector_tables_by_{column}",
            "vector_tables",
            ["environment_id", column, "created_at", "id"],
            postgresql_where=sa.text("deleted_at IS NULL"),
        )


def downgrade() -> None:
    for column in _FILTERS:
        op.drop_index(f"ix_vector_tables_by_{column}", table_name="vector_tables")
    op.drop_index("ix_api_keys_name", table_name="api_keys")
    op.drop_column("api_keys", "rate_limit_key_id")
    for column in ("tested_at", "last_error", "status"):
        op.drop_column("embedding_providers", column)
