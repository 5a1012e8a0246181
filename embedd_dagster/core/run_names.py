"""Names by which a run is launched and labelled: the API and the orchestrator's definitions both use them."""

from __future__ import annotations

from typing import Any, Final

from embedd_dagster.core.status import TaskType

CODE_LOCATION: Final = "embedd"
REPOSITORY: Final = "__repository__"
ASSET_NAME: Final = "vector_table"
JOB_NAME: Final = "vector_table_job"
PARTITION_SET: Final = "vector_tables"

PARTITION_TAG: Final = "dagster/partition"
"""The orchestrator's own: the partition of the vector table."""

TASK_TAG: Final = "embedd/task_id"
"""The task that a run was launched for. A run that was launched in the UI gets the tag once it has created its task."""

NAME_TAG: Final = "embedd/name"
"""The vector table's name when the run was launched: its partition has the name at creation."""

TASK_TYPE_TAG: Final = "embedd/task_type"
"""`backfill`, `rebackfill` or `sync`."""


def run_tags(task_id: str, partition_key: str, name: str, task_type: TaskType) -> dict[str, str]:
    """The tags of a run that is launched for a task."""
    return {PARTITION_TAG: partition_key, TASK_TAG: task_id, NAME_TAG: name, TASK_TYPE_TAG: task_type.value}


def run_config(task_type: TaskType) -> dict[str, Any]:
    """The run config of a run that is launched for a task."""
    mode = "sync" if task_type is TaskType.SYNC else "backfill"
    return {"ops": {ASSET_NAME: {"config": {"mode": mode}}}}
