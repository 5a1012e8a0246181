"""An index of what the schedule has to see first: live vector tables without a next sync."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_index(
        "ix_vector_tables_unscheduled",
        "vector_tables",
        ["id"],
        postgresql_where=sa.text("next_sync_at IS NULL AND live_version IS NOT NULL AND deleted_at IS NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_vector_tables_unscheduled", table_name="vector_tables")
