"""Which configuration's build was cancelled: it is not begun again by itself."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("vector_tables", sa.Column("held_config_version", sa.BigInteger(), nullable=True))
    op.add_column("tasks", sa.Column("config_version", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("tasks", "config_version")
    op.drop_column("vector_tables", "held_config_version")
