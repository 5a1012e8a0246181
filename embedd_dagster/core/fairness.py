"""How runs share the slots: two lanes, so that short work never waits for long work, and tags by which Dagster limits each.

The limits for these tags are in `dagster.yaml`. A run from Dagster's UI has none of them; only the pool limits it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from embedd_dagster.core.status import TaskType

LANE_TAG: Final = "embedd/queue_lane"
"""`small` or `large`: each lane is limited, so that neither can take all slots."""
LARGE_ENVIRONMENT_TAG: Final = "embedd/queue_environment"
"""On large work: one environment cannot take all slots of the lane."""
LARGE_PROVIDER_TAG: Final = "embedd/queue_provider"
"""On large work: nor can the tables of one embedding provider, which may be down."""
PRIORITY_TAG: Final = "dagster/priority"

SMALL_SYNC_ROWS: Final = 50_000


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Whose work it is, and how much there may be of it."""

    org_id: str = ""
    environment_id: str = ""
    embedding_provider_id: str | None = None
    total_rows: int = 0


def is_small(task_type: TaskType, place: QueuePlace) -> bool:
    """Whether it is over soon: a sync of a table that is not large. How long a build takes, nobody knows in advance."""
    return task_type is TaskType.SYNC and place.total_rows <= SMALL_SYNC_ROWS


def queue_tags(task_type: TaskType, place: QueuePlace) -> dict[str, str]:
    """The tags by which Dagster's queue limits a run."""
    if is_small(task_type, place):
        return {LANE_TAG: "small", PRIORITY_TAG: "1"}
    tags = {LANE_TAG: "large"}
    if place.environment_id:
        tags[LARGE_ENVIRONMENT_TAG] = place.environment_id
    if place.embedding_provider_id:
        tags[LARGE_PROVIDER_TAG] = place.embedding_provider_id
    return tags
