"""The position of a CDC stream becomes text that only its connector reads.

Until now all streams were PostgreSQL's, and the number was an LSN. It is written as PostgreSQL writes an LSN, so that an
upgraded installation continues from the same position.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.alter_column(
        "change_feeds",
        "position",
        type_=sa.Text(),
        postgresql_using="upper(to_hex(position >> 32) || '/' || to_hex(position & 4294967295))",
    )


def downgrade() -> None:
    op.alter_column(
        "change_feeds",
        "position",
        type_=sa.BigInteger(),
        postgresql_using="pg_wal_lsn_diff(position::pg_lsn, '0/0')::bigint",
    )
