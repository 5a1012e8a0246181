"""The shards of a build and their checkpoints. Each change is fenced by the build's task, in the same transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.tables import Shard
from embedd_dagster.core.keys import Key, decode_key, encode_key
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.shards import KeyRange


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard as last checkpointed; `remaining` is the key range that is still to be read."""

    ordinal: int
    remaining: KeyRange
    done: bool
    counts: dict[str, int]


def create(session: Session, vector_table_id: str, version: int, ranges: Sequence[KeyRange]) -> None:
    """The shards of a build that begins."""
    for ordinal, key_range in enumerate(ranges):
        session.add(
            Shard(
                vector_table_id=vector_table_id,
                version=version,
                ordinal=ordinal,
                lower_key=None if key_range.lower is None else encode_key(key_range.lower),
                upper_key=None if key_range.upper is None else encode_key(key_range.upper),
                done=False,
                counts={},
            )
        )


def read(session: Session, vector_table_id: str, version: int) -> list[ShardState]:
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


def record(
    session: Session,
    vector_set: VectorSet,
    ordinal: int,
    *,
    last_key: Key | None,
    done: bool,
    counts: Mapping[str, int],
) -> None:
    """Records that every row of the shard up to `last_key` is stored or failed; None leaves the key as it is."""
    row = session.get_one(Shard, (vector_set.vector_table_id, vector_set.version, ordinal), populate_existing=True)
    if last_key is not None:
        row.last_key = encode_key(last_key)
    row.done = done
    row.counts = dict(counts)
