"""Fingerprints of CDC tables, which reveal changes that were made while no consumer ran."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("vector_tables", sa.Column("followed_shape", JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("vector_tables", "followed_shape")
