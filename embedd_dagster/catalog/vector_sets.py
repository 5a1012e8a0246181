"""Built versions of vector tables: which is being built, how far, which is live, which are to be dropped.

Every change made for a run is fenced by its task (`tasks.assert_owner`), in the same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from sqlalchemy import ARRAY, String, any_, bindparam, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import now
from embedd_dagster.catalog.pages import Page, Position
from embedd_dagster.catalog.tables import FailedRow, Shard, VectorSetRow, VectorTable
from embedd_dagster.core.keys import Key, decode_key, encode_key
from embedd_dagster.core.rows import Fingerprint, TableDigest, VectorSet
from embedd_dagster.core.shards import KeyRange
from embedd_dagster.core.status import VectorSetState
from embedd_dagster.core.vector_table import VectorConfiguration


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard of a build as last checkpointed: what is left to read is `remaining`."""

    ordinal: int
    remaining: KeyRange
    done: bool
    counts: dict[str, int]


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
    """The build that was left unfinished, of whatever configuration, or None."""
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
    for ordinal, key_range in enumerate(ranges):
        session.add(
            Shard(
                vector_table_id=table.id,
                version=row.version,
                ordinal=ordinal,
                lower_key=None if key_range.lower is None else encode_key(key_range.lower),
                upper_key=None if key_range.upper is None else encode_key(key_range.upper),
                done=False,
                counts={},
            )
        )
    session.flush()
    return row


def shards(session: Session, vector_table_id: str, version: int) -> list[ShardState]:
    """The shards of a build, by ordinal."""
    rows = session.scalars(
        select(Shard)
        .where(Shard.vector_table_id == vector_table_id, Shard.version == version)
        .order_by(Shard.ordinal)
        .execution_options(populate_existing=True)
    )
    return [
        ShardState(
            row.ordinal,
            KeyRange(
                lower=_decode(row.last_key if row.last_key is not None else row.lower_key), upper=_decode(row.upper_key)
            ),
            row.done,
            dict(row.counts),
        )
        for row in rows
    ]


def _decode(key: str | None) -> Key | None:
    return None if key is None else decode_key(key)


def checkpoint_shard(
    session: Session,
    vector_set: VectorSet,
    ordinal: int,
    *,
    last_key: Key | None,
    done: bool,
    counts: Mapping[str, int],
) -> None:
    """Records that every row of the shard up to `last_key` is dealt with; None leaves the key where it is."""
    row = session.get_one(Shard, (vector_set.vector_table_id, vector_set.version, ordinal), populate_existing=True)
    if last_key is not None:
        row.last_key = encode_key(last_key)
    row.done = done
    row.counts = dict(counts)


def get(session: Session, vector_table_id: str, version: int) -> VectorSetRow:
    """The record of a version."""
    return session.get_one(VectorSetRow, (vector_table_id, version), populate_existing=True)


def set_digest(row: VectorSetRow, digest: TableDigest) -> None:
    """Keeps the source's digest beside the version it describes."""
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


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no vector; never its content."""

    key: Key
    row_hash: int
    bucket: int
    step: str
    code: str
    message: str


def record_failures(session: Session, vector_set: VectorSet, failures: Sequence[RowFailure]) -> None:
    """Keeps the failures, counting attempts; idempotent but for that count."""
    if not failures:
        return
    instant = now()
    statement = insert(FailedRow).values(
        [
            {
                "vector_table_id": vector_set.vector_table_id,
                "version": vector_set.version,
                "key": encode_key(failure.key),
                "row_hash": failure.row_hash,
                "bucket": failure.bucket,
                "step": failure.step,
                "code": failure.code,
                "message": failure.message,
                "attempts": 1,
                "first_failed_at": instant,
                "last_failed_at": instant,
            }
            for failure in failures
        ]
    )
    changed: dict[str, Any] = {
        name: statement.excluded[name] for name in ("row_hash", "bucket", "step", "code", "message", "last_failed_at")
    }
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["vector_table_id", "version", "key"],
            set_={**changed, "attempts": FailedRow.attempts + 1},
        )
    )


def failures(session: Session, vector_set: VectorSet) -> list[Fingerprint]:
    """The failed rows as they were when they failed, by key."""
    statement = select(FailedRow.key, FailedRow.row_hash, FailedRow.bucket).where(
        FailedRow.vector_table_id == vector_set.vector_table_id, FailedRow.version == vector_set.version
    )
    rows = session.execute(statement.order_by(FailedRow.key))
    return [Fingerprint(decode_key(key), row_hash, bucket) for key, row_hash, bucket in rows]


def count_failures(session: Session, vector_table_id: str, version: int) -> int:
    """How many rows of a version have failed."""
    statement = select(func.count()).select_from(FailedRow)
    statement = statement.where(FailedRow.vector_table_id == vector_table_id, FailedRow.version == version)
    return session.scalar(statement) or 0


def failed_page(session: Session, vector_table_id: str, limit: int, after: Position | None) -> Page[FailedRow]:
    """Failed rows of the newest version that has any, the latest to fail first."""
    newest = select(func.max(FailedRow.version)).where(FailedRow.vector_table_id == vector_table_id).scalar_subquery()
    statement = select(FailedRow).where(FailedRow.vector_table_id == vector_table_id, FailedRow.version == newest)
    order = (FailedRow.first_failed_at, FailedRow.key)
    if after is not None:
        statement = statement.where(tuple_(*order) < tuple_(after.created_at, after.object_id))
    rows = list(session.scalars(statement.order_by(*(column.desc() for column in order)).limit(limit + 1)))
    following = Position(rows[limit - 1].first_failed_at, rows[limit - 1].key) if len(rows) > limit else None
    return Page(rows[:limit], following)


def clear_failures(session: Session, vector_set: VectorSet, keys: Sequence[Key]) -> None:
    """Forgets failures of rows that are written, without text, or gone by now."""
    # one parameter, however many keys: PostgreSQL takes at most 65,535
    array = bindparam("keys", [encode_key(key) for key in keys], type_=ARRAY(String))
    session.execute(
        delete(FailedRow).where(
            FailedRow.vector_table_id == vector_set.vector_table_id,
            FailedRow.version == vector_set.version,
            FailedRow.key == any_(array),
        )
    )
