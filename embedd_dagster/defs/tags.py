"""How a run says what it is for."""

from __future__ import annotations

from typing import Final

TASK_TAG: Final = "embedd/task_id"
"""The task that a run was launched for. The API sets it, the sensor does, and a run from the UI once it has made one."""

OUTCOME_TAG: Final = "embedd/outcome"
"""On a run that materialized nothing, though nothing is wrong: `superseded` where it found its task done, or another
run's; `paused` where its vector table is, and nobody asked for it by hand."""

NAME_TAG: Final = "embedd/name"
"""The vector table's name when the run was launched: its partition has the name at creation."""

TASK_TYPE_TAG: Final = "embedd/task_type"
"""`backfill`, `rebackfill` or `sync`."""

MODE_TAG: Final = "embedd/mode"
"""`sync` or `backfill`, on runs whose config nobody can write: those of automation conditions."""

AUTOMATIC_TAGS: Final = ("dagster/schedule_name", "dagster/sensor_name", "dagster/from_automation_condition")
"""Dagster's own: on a run that no person has asked for."""

CONNECTION_TAG: Final = "embedd/connection_id"
"""The connection whose log a run follows."""

PARTITION_TAG: Final = "dagster/partition"
"""Dagster's own: the vector table."""

BACKFILL_TAG: Final = "dagster/backfill"
"""Dagster's own: the backfill that a run is part of, which somebody launched for several partitions together."""

CANCELLED_BY_TAG: Final = "embedd/cancelled_by"
"""`somebody`: the run was cancelled on its own while its backfill went on. Dagster does not say who cancels a run."""
