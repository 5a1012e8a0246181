"""Tags on runs that only Dagster's side uses; those that the API sets as well are in `core.run_names`."""

from __future__ import annotations

from typing import Final

OUTCOME_TAG: Final = "embedd/outcome"
"""On a run that materialized nothing although nothing is wrong: `superseded` if its task was done or owned by another run,
`paused` if its vector table is paused and the run was not launched by a person."""

MODE_TAG: Final = "embedd/mode"
"""`sync` or `backfill`, on runs whose config cannot be written: those of automation conditions."""

AUTOMATIC_TAGS: Final = ("dagster/schedule_name", "dagster/sensor_name", "dagster/from_automation_condition")
"""Dagster's own, on a run that was not launched by a person."""

CONNECTION_TAG: Final = "embedd/connection_id"
"""The connection whose log a CDC consumer reads."""

BACKFILL_TAG: Final = "dagster/backfill"
"""Dagster's own: the backfill of several partitions that a run is part of."""

CANCELLED_BY_TAG: Final = "embedd/cancelled_by"
"""`somebody`: a person cancelled this run alone while its backfill continued. Dagster does not record who cancels a run."""
