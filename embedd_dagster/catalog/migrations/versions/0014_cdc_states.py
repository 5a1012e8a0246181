"""A table for the CDC state of vector tables, a hash as the key of failed rows, and whether a vector table has failed."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_MOVED = {
    "followed_since": "subscribed_since",
    "followed_shape": "table_fingerprint",
    "changes_pending": "changes_pending",
    "resync_held_by": "buffered_by_run_id",
    "resync_wanted": "resync_requested_seq",
    "resync_done": "resync_completed_seq",
    "resync_reason": "resync_reason",
    "resync_options": "resync_options",
    "resync_not_before": "resync_not_before",
}
"""The columns of `vector_tables`, and their names in `cdc_states`."""


def _state_columns(names: list[str]) -> list[sa.Column[Any]]:
    types: list[tuple[Any, str | None]] = [
        (TIMESTAMP(timezone=True), None),
        (JSONB(), None),
        (sa.BigInteger(), "0"),
        (sa.Text(), None),
        (sa.BigInteger(), "0"),
        (sa.BigInteger(), "0"),
        (sa.Text(), None),
        (JSONB(), "{}"),
        (TIMESTAMP(timezone=True), None),
    ]
    return [
        sa.Column(name, column_type, nullable=default is None, server_default=default)
        for name, (column_type, default) in zip(names, types, strict=True)
    ]


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "cdc_states",
        sa.Column("vector_table_id", sa.Text(), nullable=False),
        *_state_columns(list(_MOVED.values())),
        sa.ForeignKeyConstraint(
            ["vector_table_id"], ["vector_tables.id"], name="fk_cdc_states_vector_table_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("vector_table_id", name="pk_cdc_states"),
    )
    op.execute(
        f"INSERT INTO cdc_states (vector_table_id, {', '.join(_MOVED.values())}) "  # noqa: S608 - the names above
        f"SELECT id, {', '.join(_MOVED)} FROM vector_tables"
    )
    op.create_index(
        "ix_cdc_states_resync",
        "cdc_states",
        ["vector_table_id"],
        postgresql_where=sa.text("resync_requested_seq > resync_completed_seq"),
    )
    op.drop_index("ix_vector_tables_resync", table_name="vector_tables")
    for name in _MOVED:
        op.drop_column("vector_tables", name)
    op.add_column("vector_tables", sa.Column("has_failed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE vector_tables SET has_failed = true WHERE sync_status = 'error'")
    op.add_column("failed_rows", sa.Column("key_hash", sa.LargeBinary(), nullable=True))
    op.execute("UPDATE failed_rows SET key_hash = sha256(convert_to(key, 'UTF8'))")
    op.drop_constraint("pk_failed_rows", "failed_rows")
    op.create_primary_key("pk_failed_rows", "failed_rows", ["vector_table_id", "version", "key_hash"])


def downgrade() -> None:
    # a key that is too long for the index is forgotten: the next full sync meets its row again
    op.execute("DELETE FROM failed_rows WHERE octet_length(key) > 2000")
    op.drop_constraint("pk_failed_rows", "failed_rows")
    op.create_primary_key("pk_failed_rows", "failed_rows", ["vector_table_id", "version", "key"])
    op.drop_column("failed_rows", "key_hash")
    op.drop_column("vector_tables", "has_failed")
    for column in _state_columns(list(_MOVED)):
        op.add_column("vector_tables", column)
    op.execute(
        "UPDATE vector_tables SET "  # noqa: S608 - the names above
        + ", ".join(f"{before} = cdc_states.{name}" for before, name in _MOVED.items())
        + " FROM cdc_states WHERE vector_table_id = vector_tables.id"
    )
    op.create_index(
        "ix_vector_tables_resync",
        "vector_tables",
        ["id"],
        postgresql_where=sa.text("resync_wanted > resync_done"),
    )
    op.drop_table("cdc_states")
