"""Built versions of vector tables: which is being built, how far, which is live, which are to be dropped.

Every change made for a run is fenced by its task (`tasks.assert_owner`), in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog import shard_checkpoints
from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.tables import FailedRow, Shard, VectorSetRow, VectorTable
from embedd_dagster.core.rows import TableDigest, VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.status import VectorSetState
from embedd_dagster.core.vector_table import VectorConfiguration


def as_vector_set(row: VectorSetRow, public_name: str) -> VectorSet:
    """What a store must know of this version."""
    configuration = VectorConfiguration.from_json(row.configuration)
    return VectorSet(
        vector_table_id=row.vector_table_id,
        version=row.version,
        public_name=public_name,
        dimensions=configuration.embedding_dimensions,
        filter_types=configuration.filter_types,
        key_type=row.key_type,
    )


def find_unfinished(session: Session, vector_table_id: str) -> VectorSetRow | None:
    """The unfinished build, of any configuration, or None."""
    return session.scalar(
        select(VectorSetRow)
        .where(VectorSetRow.vector_table_id == vector_table_id, VectorSetRow.state == VectorSetState.BUILDING.value)
        .order_by(VectorSetRow.version.desc())
        .limit(1)
    )


def begin_build(
    session: Session, table: VectorTable, *, key_type: str, digest: TableDigest, ranges: Sequence[KeyRange]
) -> VectorSetRow:
    """A new version to build, with its shards; builds that were left unfinished are retired."""
    for unfinished in session.scalars(
        select(VectorSetRow).where(
            VectorSetRow.vector_table_id == table.id, VectorSetRow.state == VectorSetState.BUILDING.value
        )
    ):
        _retire(session, unfinished)
    latest = session.scalar(select(func.max(VectorSetRow.version)).where(VectorSetRow.vector_table_id == table.id))
    row = VectorSetRow(
        vector_table_id=table.id,
        version=(latest or 0) + 1,
        state=VectorSetState.BUILDING.value,
        config_version=table.config_version,
        configuration=table.configuration.to_json(),
        key_type=key_type,
        created_at=now(),
    )
    set_digest(row, digest)
    session.add(row)
    session.flush()
    shard_checkpoints.create(session, table.id, row.version, ranges)
    session.flush()
    return row


def get(session: Session, vector_table_id: str, version: int) -> VectorSetRow:
    """The record of a version."""
    return session.get_one(VectorSetRow, (vector_table_id, version), populate_existing=True)


def set_digest(row: VectorSetRow, digest: TableDigest) -> None:
    """Stores the source's digest with the version it describes."""
    row.digest_bits = digest.bits
    row.digest = digest.values.astype("<i8").tobytes()
    row.row_count = digest.row_count


def stored_digest(row: VectorSetRow) -> TableDigest | None:
    """The digest as of the last completed sync, or None."""
    if row.digest is None or row.digest_bits is None:
        return None
    return TableDigest(row.digest_bits, np.frombuffer(row.digest, dtype="<i8"), row.row_count or 0)


def mark_live(session: Session, table: VectorTable, row: VectorSetRow) -> None:
    """The swap: from this commit on queries go to this version; the one before is retired. Idempotent."""
    if table.live_version is not None and table.live_version != row.version:
        _retire(session, get(session, table.id, table.live_version))
    row.state = VectorSetState.LIVE.value
    row.live_at = row.live_at or now()
    table.live_version = row.version
    table.syncs_since_full = 0
    session.execute(delete(Shard).where(Shard.vector_table_id == table.id, Shard.version == row.version))


def _retire(session: Session, row: VectorSetRow) -> None:
    row.state = VectorSetState.RETIRED.value
    row.retired_at = now()
    row.digest = None
    for model in (Shard, FailedRow):
        session.execute(delete(model).where(model.vector_table_id == row.vector_table_id, model.version == row.version))


def retired(session: Session, grace: timedelta) -> list[tuple[str, int]]:
    """(vector table id, version) of sets that were replaced longer than `grace` ago, or never went live."""
    statement = select(VectorSetRow.vector_table_id, VectorSetRow.version).where(
        VectorSetRow.state == VectorSetState.RETIRED.value,
        (VectorSetRow.live_at.is_(None)) | (VectorSetRow.retired_at < func.now() - grace),
    )
    return [(vector_table_id, version) for vector_table_id, version in session.execute(statement)]


def forget(session: Session, vector_table_id: str, version: int) -> None:
    """Removes the record of a set that the store has dropped. Idempotent."""
    session.execute(
        delete(VectorSetRow).where(VectorSetRow.vector_table_id == vector_table_id, VectorSetRow.version == version)
    )
