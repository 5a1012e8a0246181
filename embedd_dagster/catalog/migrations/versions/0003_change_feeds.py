"""CDC: one stream per connection, and the resync that a vector table needs after an interruption."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIME = postgresql.TIMESTAMP(timezone=True)
_OWED = "ix_vector_tables_resync"
_FOLLOWED = "ix_vector_tables_followed"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for name in ("resync_wanted", "resync_done", "syncs_since_full", "changes_pending"):
        op.add_column("vector_tables", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("vector_tables", sa.Column("resync_reason", sa.Text(), nullable=True))
    op.add_column(
        "vector_tables", sa.Column("resync_options", postgresql.JSONB(), nullable=False, server_default=sa.text("'{}'"))
    )
    op.add_column("vector_tables", sa.Column("resync_held_by", sa.Text(), nullable=True))
    op.add_column("vector_tables", sa.Column("resync_not_before", _TIME, nullable=True))
    op.add_column("vector_tables", sa.Column("followed_since", _TIME, nullable=True))
    op.create_index(_OWED, "vector_tables", ["id"], postgresql_where=sa.text("resync_wanted > resync_done"))
    op.create_index(
        _FOLLOWED,
        "vector_tables",
        ["connection_id"],
        postgresql_where=sa.text("sync_mode = 'cdc' AND deleted_at IS NULL"),
    )
    op.add_column("tasks", sa.Column("resync", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "change_feeds",
        sa.Column("connection_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.Column("lag_bytes", sa.BigInteger(), nullable=True),
        sa.Column("caught_up_at", _TIME, nullable=True),
        sa.Column("dagster_run_id", sa.Text(), nullable=True),
        sa.Column("claimed_at", _TIME, nullable=True),
        sa.Column("heartbeat_at", _TIME, nullable=True),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("next_start_at", _TIME, nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("last_error_at", _TIME, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["connection_id"], ["connections.id"], name=op.f("fk_change_feeds_connection_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("connection_id", name=op.f("pk_change_feeds")),
    )


def downgrade() -> None:
    op.drop_table("change_feeds")
    op.drop_column("tasks", "resync")
    op.drop_index(_FOLLOWED, table_name="vector_tables")
    op.drop_index(_OWED, table_name="vector_tables")
    for name in (
        "resync_wanted", "resync_done", "syncs_since_full", "changes_pending", "resync_reason", "resync_options",
        "resync_held_by", "resync_not_before", "followed_since",
    ):  # fmt: skip
        op.drop_column("vector_tables", name)
