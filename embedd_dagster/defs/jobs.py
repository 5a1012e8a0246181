"""The one job: materialize one vector table and check it. The API launches it by this name."""

from __future__ import annotations

import dagster as dg

from embedd_dagster.core.run_names import JOB_NAME
from embedd_dagster.defs.assets import vector_table

vector_table_job = dg.define_asset_job(
    JOB_NAME,
    selection=dg.AssetSelection.assets(vector_table),  # with its checks
    executor_def=dg.in_process_executor,  # a separate process for the step would cost two seconds
    description="Backfills or syncs one vector table, then checks it.",
)
