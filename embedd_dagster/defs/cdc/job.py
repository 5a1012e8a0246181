"""The job whose runs are the CDC consumers: one run for each connection.

A run writes at most one materialization per vector table and minute: what it applied, and how far it is behind.
"""

import dagster as dg
from pydantic import Field

from embedd_dagster.core.run_names import ASSET_NAME
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.materialization import Links, describe_follow_report
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.stopping import stop_requested
from embedd_dagster.engine.cdc.consumer import run_consumer
from embedd_dagster.engine.cdc.report import CdcReport


class CdcConfig(dg.Config):
    """Whose log is followed."""

    connection_id: str = Field(description="A connection with vector tables of sync_mode `cdc`")


@dg.op(
    description="Applies what the source's log says has changed, until it is asked to end or another run takes over."
)
def follow_changes(context: dg.OpExecutionContext, config: CdcConfig, runtime: RuntimeResource) -> None:
    """One run of the follower; what ends it well is in its log."""
    try:
        opened = runtime.open()

        def report(done: CdcReport) -> None:
            context.log_event(
                dg.AssetMaterialization(
                    asset_key=ASSET_NAME,
                    partition=done.partition_key,
                    description="Changes that were captured in the source's log",
                    metadata=describe_follow_report(done, Links.of(opened.settings)),
                )
            )

        with heartbeat(opened, context.run_id, context.log.info), stop_requested() as should_stop:
            reason = run_consumer(
                opened,
                config.connection_id,
                context.run_id,
                log=context.log.info,
                report=report,
                should_stop=should_stop,
            )
    except Exception as error:  # noqa: BLE001 - every error is translated, so that no row's content is shown
        raise as_failure(error) from None
    context.log.info(reason)
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
        raise dg.DagsterExecutionInterruptedError


@dg.job(
    executor_def=dg.in_process_executor,
    description="Follows one connection's log for its cdc vector tables. Kept alive by `follower_sensor`.",
)
def follow_job() -> None:
    """The job of the followers."""
    follow_changes()
