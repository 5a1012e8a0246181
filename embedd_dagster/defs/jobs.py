"""The one job: materialize one vector table and check it. The API launches it by this name."""

from __future__ import annotations

import dagster as dg

from embedd_dagster.defs.assets import vector_table

vector_table_job = dg.define_asset_job(
    "vector_table_job",
    selection=dg.AssetSelection.assets(vector_table),  # with its checks
    executor_def=dg.in_process_executor,  # a step in a process of its own costs two seconds, and gains nothing
    description="Backfills or syncs one vector table, then checks it.",
)
