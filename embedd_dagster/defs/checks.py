"""What is asserted of a vector table after each materialization; the check that must block a swap is the engine's.

It is one check, and partitioned: Dagster shows its result for each vector table. Several checks would come from the same look
at the same two sides, so one source that is down would turn all of them red.
"""

import warnings

import dagster as dg

from embedd_dagster.catalog import partitions as catalog_partitions
from embedd_dagster.defs.assets import vector_table
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.partitions import vector_tables
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.verdicts import CHECK_NAME, judge, not_looked_at
from embedd_dagster.engine.inspect import inspect_live_set
from embedd_dagster.errors import NotFound


def _spec() -> dg.AssetCheckSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # of partitioned checks; Dagster's version is pinned
        return dg.AssetCheckSpec(
            CHECK_NAME,
            asset=vector_table,
            description="Every row of the source has a point, except rows without text; no row was refused; a sample of the "
            "points has the configured dimensions, and was made from the rows as they are now.",
            partitions_def=vector_tables,
        )


@dg.multi_asset_check(name="vector_table_checks", specs=[_spec()])
def vector_table_checks(context: dg.AssetCheckExecutionContext, runtime: RuntimeResource) -> dg.AssetCheckResult:
    """The verdict on what is live. What could not be looked at is a warning: the run has done its work."""
    try:
        opened = runtime.open()
        with heartbeat(opened, context.run.run_id, context.log.info):
            with opened.catalog.transaction() as session:
                table = catalog_partitions.find_table(session, context.partition_key)
            if table is None:
                raise NotFound("vector_table", context.partition_key)
            return judge(inspect_live_set(opened, table.id))
    except Exception as error:  # noqa: BLE001 - the table is materialized all the same and its task completed
        return not_looked_at(as_failure(error))
