"""The key of a vector table's partition in Dagster, which people can read; and how many texts a set had to cut.

A vector table that exists gets the name under which it is stored. Dagster's own storage follows by itself: the reconcile
sensor adds the new partitions, moves the history of the old ones (whose keys were ids), and then removes those.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("vector_tables", sa.Column("partition_key", sa.Text(), nullable=True))
    op.execute("UPDATE vector_tables SET partition_key = storage_name")
    op.alter_column("vector_tables", "partition_key", nullable=False)
    op.create_unique_constraint("uq_vector_tables_partition_key", "vector_tables", ["partition_key"])
    # None: the set was built before this was counted
    op.add_column("vector_sets", sa.Column("truncated_count", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("vector_sets", "truncated_count")
    op.drop_constraint("uq_vector_tables_partition_key", "vector_tables")
    op.drop_column("vector_tables", "partition_key")
