"""Which table of the source a built version was read from, so that it shows when the name means another one."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("vector_sets", sa.Column("source_origin", JSONB(), nullable=True))


def downgrade() -> None:
    op.drop_column("vector_sets", "source_origin")
