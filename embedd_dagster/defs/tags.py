"""How a run says what it is for."""

from __future__ import annotations

from typing import Final

TASK_TAG: Final = "embedd/task_id"
"""The task that a run was launched for. The API sets it, the sensor does, and a run from the UI once it has made one."""

OUTCOME_TAG: Final = "embedd/outcome"
"""`superseded` on a run that found its task done, or another run's: it materialized nothing, and nothing is wrong."""

CONNECTION_TAG: Final = "embedd/connection_id"
"""The connection whose log a run follows."""

PARTITION_TAG: Final = "dagster/partition"
"""Dagster's own: the vector table."""
