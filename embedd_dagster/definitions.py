"""What the Dagster code location contains. Loading it connects to nothing and reads no setting."""

from __future__ import annotations

import dagster as dg

from embedd_dagster import logs
from embedd_dagster.defs.assets import source_table, vector_table
from embedd_dagster.defs.cdc.job import follow_job
from embedd_dagster.defs.cdc.sensor import follower_sensor
from embedd_dagster.defs.checks import vector_table_checks
from embedd_dagster.defs.cleanup import cleanup_sensor
from embedd_dagster.defs.jobs import vector_table_job
from embedd_dagster.defs.reconcile.sensor import reconcile_sensor
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.retention import purge_job, purge_schedule
from embedd_dagster.defs.schedules import sync_sensor

logs.lose_unwritable_lines()

defs = dg.Definitions(
    assets=[source_table, vector_table],
    asset_checks=[vector_table_checks],
    jobs=[vector_table_job, follow_job, purge_job],
    sensors=[reconcile_sensor, sync_sensor, follower_sensor, cleanup_sensor],
    schedules=[purge_schedule],
    resources={"runtime": RuntimeResource()},
    executor=dg.in_process_executor,
)
