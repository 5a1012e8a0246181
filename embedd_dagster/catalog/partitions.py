"""Dagster's partitions as the catalog knows them, and what a run is launched with. A key is never taken apart."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.tables import VectorTable
from embedd_dagster.core.fairness import QueuePlace


def find_table(session: Session, partition_key: str, *, lock: bool = False) -> VectorTable | None:
    """The vector table of a partition in Dagster, deleted or not, or None.

    Until version 0013 of the catalog the key was the id: runs that were launched before still have it.
    """
    statement = select(VectorTable).where(
        or_(VectorTable.partition_key == partition_key, VectorTable.id == partition_key)
    )
    if lock:
        statement = statement.with_for_update().execution_options(populate_existing=True)
    return session.scalar(statement)


def present_keys(session: Session) -> dict[str, str]:
    """The keys of Dagster's partitions, by the ids of all vector tables that are not being deleted."""
    present = select(VectorTable.id, VectorTable.partition_key).where(VectorTable.deleted_at.is_(None))
    return dict(session.execute(present).all())


@dataclass(frozen=True, slots=True)
class RunLabel:
    """What a run in Dagster shows of its vector table from the launch on."""

    partition_key: str
    name: str

    @classmethod
    def of(cls, row: VectorTable) -> RunLabel:
        """The label as of now."""
        return cls(row.partition_key, row.name)


def run_labels(session: Session, vector_table_ids: Collection[str]) -> dict[str, RunLabel]:
    """The labels by id; none for a vector table that is gone."""
    wanted = select(VectorTable.id, VectorTable.partition_key, VectorTable.name)
    found = session.execute(wanted.where(VectorTable.id.in_(vector_table_ids)))
    return {key: RunLabel(partition_key, name) for key, partition_key, name in found}


def queue_places(session: Session, vector_table_ids: Collection[str]) -> dict[str, QueuePlace]:
    """Whose work each of these vector tables is, and how many rows there are."""
    statement = select(
        VectorTable.id,
        VectorTable.org_id,
        VectorTable.environment_id,
        VectorTable.embedding_provider_id,
        VectorTable.total_rows,
    )
    found = session.execute(statement.where(VectorTable.id.in_(vector_table_ids)))
    return {key: QueuePlace(org, environment, provider, rows) for key, org, environment, provider, rows in found}
