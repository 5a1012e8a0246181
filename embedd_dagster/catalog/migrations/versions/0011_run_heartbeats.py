"""Heartbeats of runs whether or not they own a task, and how often a task was given back without costing an attempt."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "run_heartbeats",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_run_heartbeats")),
    )
    op.add_column("tasks", sa.Column("handed_back", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("tasks", "handed_back")
    op.drop_table("run_heartbeats")
