"""What all processes together use of an embedding provider's limits."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "provider_budgets",
        sa.Column("embedding_provider_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("level", sa.Double(), nullable=False),
        sa.Column("updated_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["embedding_provider_id"],
            ["embedding_providers.id"],
            name=op.f("fk_provider_budgets_embedding_provider_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("embedding_provider_id", "kind", name=op.f("pk_provider_budgets")),
    )


def downgrade() -> None:
    op.drop_table("provider_budgets")
