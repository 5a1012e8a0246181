"""The bucket of a failed row, so that a sync of some buckets sees which failed rows are gone."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    # a row that failed before is found in the wrong bucket, forgotten, and met again by the next full sync
    op.add_column("failed_rows", sa.Column("bucket", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("failed_rows", "bucket")
