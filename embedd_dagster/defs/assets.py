"""The one asset, and the external one that it is made from."""

from collections.abc import Iterator, Mapping
from enum import Enum

import dagster as dg
from pydantic import Field

from embedd_dagster.catalog import partitions as catalog_partitions
from embedd_dagster.catalog import tasks, vector_tables
from embedd_dagster.connectors import registry
from embedd_dagster.core.run_names import NAME_TAG, PARTITION_SET, TASK_TAG, TASK_TYPE_TAG
from embedd_dagster.core.status import LIVE_TASK_STATUSES, TaskType
from embedd_dagster.defs import partitions
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.materialization import Links, data_version, describe_report
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.stopping import cancel_was_asked_for, stop_signal
from embedd_dagster.defs.tags import AUTOMATIC_TAGS, MODE_TAG, OUTCOME_TAG
from embedd_dagster.defs.verdicts import not_checked
from embedd_dagster.engine.report import RunReport
from embedd_dagster.engine.run import run_task
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import NotFound, NotReady, RunCancelled, RunSuperseded

GROUP = "vector_tables"
# Dagster accepts three kinds of an asset
SOURCE_KINDS, STORE_KINDS = {"table", *registry.sources()[:2]}, {"vectors", *registry.managed_stores()[:2]}
OWNERS = ["team:data-engineering"]

source_table = dg.AssetSpec(
    "source_table",
    description=(
        "The tables and views in customers' databases that vector tables are made from: one asset for all of them. "
        "The materializations of `vector_table` say in `source_table` which one each partition is made from."
    ),
    group_name=GROUP,
    owners=OWNERS,
    kinds=SOURCE_KINDS,
)


class RunMode(Enum):
    """The kinds of materialization. Lower case, because Dagster's run config goes by the names of an Enum."""

    backfill = "backfill"
    sync = "sync"


class VectorTableConfig(dg.Config):
    """What a materialization is to do; a run that was launched for a task does what the task says instead."""

    mode: RunMode = Field(
        default=RunMode.backfill,
        description="backfill: build a new set of vectors and switch to it. sync: bring what is live up to date.",
    )
    full: bool = Field(default=False, description="sync: compare every row, also where the digests agree")
    retry_failed: bool = Field(default=False, description="sync: try failed rows again, though they are the same")
    confirm_mass_delete: bool = Field(default=False, description="sync: the source is emptied on purpose")


@dg.asset(
    partitions_def=partitions.vector_tables,
    deps=[source_table],
    group_name=GROUP,
    owners=OWNERS,
    kinds=STORE_KINDS,
    tags={"domain": "vector-search"},
    code_version="1",
    pool=partitions.vector_tables.name,  # `dagster.yaml` says how many of its runs there may be at once
    output_required=False,  # a run that finds its task done elsewhere materializes nothing, and has not failed
    description=(
        "The vectors of one source table, searchable by meaning. A partition is a vector table of the API, under the name "
        "that it was created with. Its materialization is a backfill (built next to the live vectors, then switched to in "
        "one step) or a sync; materializing it here does the same as the API: it is recorded as a task, and refused while "
        "one is live."
    ),
)
def vector_table(
    context: dg.AssetExecutionContext, config: VectorTableConfig, runtime: RuntimeResource
) -> Iterator[dg.MaterializeResult | dg.AssetCheckEvaluation]:  # type: ignore[type-arg]
    """One backfill or sync, for the task named in the run's tag or for one that it makes."""
    run_id = context.run.run_id
    instance = context.instance

    def cancelled() -> bool:
        return cancel_was_asked_for(instance, run_id)

    try:
        opened = runtime.open()
        task_id = find_or_create_task(opened, context, config)
        # the API launches a table's first run maybe before the sensor has added its partition
        instance.add_dynamic_partitions(PARTITION_SET, [context.partition_key])
        if task_id is None:
            context.log.info("Nothing to do: the vector table is paused, and nobody asked for this by hand.")
            instance.add_run_tags(run_id, {OUTCOME_TAG: "paused"})
            return
        if tags := _missing_tags(opened, task_id, context.run.tags):
            instance.add_run_tags(run_id, tags)
        with heartbeat(opened, run_id, context.log.info), stop_signal(cancelled) as should_stop:
            report = run_task(opened, task_id, run_id, log=context.log.info, should_stop=should_stop)
    except RunSuperseded as superseded:
        context.log.warning("Nothing to do: %s", superseded)
        instance.add_run_tags(run_id, {OUTCOME_TAG: "superseded"})
        return
    except RunCancelled as error:
        context.log.info(str(error))
        if not cancelled():  # it was asked for through the API: without this Dagster would call it a failure
            instance.report_run_canceling(context.run, message=str(error))
        raise dg.DagsterExecutionInterruptedError from None
    except Exception as error:  # noqa: BLE001 - every error is translated, so that no row's content is shown
        failure = as_failure(error)
    else:
        yield dg.MaterializeResult(
            metadata=describe_report(report, Links.of(opened.settings)),
            data_version=_data_version(context, report),
        )
        return
    # a check that the run does not reach would be shown as failed to execute, as if the check had a fault
    yield not_checked(context.partition_key, failure)
    raise failure


def find_or_create_task(runtime: Runtime, context: dg.AssetExecutionContext, config: VectorTableConfig) -> str | None:
    """The id of the run's task; one of its own for a materialization asked for in the UI, or by somebody's own schedule.

    None where the vector table is paused and a schedule, sensor or automation condition asked.

    Raises Conflict while another task of the vector table is live, NotFound, and NotReady for a sync of what never was
    built.
    """
    named = context.run.tags.get(TASK_TAG)
    with runtime.catalog.transaction() as session:
        if named is not None:
            task = tasks.find(session, named)
            # "re-execute" in the UI copies the tags of a run whose task has ended: it means the same work again
            ended = task is None or task.status not in LIVE_TASK_STATUSES
            if not (ended and context.run.parent_run_id):
                return named
        table = catalog_partitions.find_table(session, context.partition_key, lock=True)
        if table is None or table.deleted_at is not None:
            raise _no_such_partition(context.partition_key)
        by_hand = context.run.parent_run_id or not any(tag in context.run.tags for tag in AUTOMATIC_TAGS)
        if table.paused and not by_hand:
            return None
        built = table.live_version is not None
        if _mode(context, config) is RunMode.sync:
            if not built:
                raise NotReady(
                    f"{table.name!r} was never built, so there is nothing to sync.",
                    resolution="Materialize it with mode `backfill` first.",
                )
            task_type = TaskType.SYNC
        else:
            task_type = TaskType.REBACKFILL if built else TaskType.BACKFILL
        chosen = config.model_dump(include={"full", "retry_failed", "confirm_mass_delete"})
        task = tasks.create(
            session,
            table,
            task_type,
            max_attempts=runtime.settings.max_task_attempts,
            options={name: value for name, value in chosen.items() if value},
        )
        tasks.record_launch(session, task.id, context.run.run_id)
        task_id = task.id
    context.instance.add_run_tags(context.run.run_id, {TASK_TAG: task_id})
    return task_id


def _no_such_partition(partition_key: str) -> NotFound:
    error = NotFound(
        "vector_table",
        partition_key,
        resolution="Choose a partition from the list, where each vector table has one. New ones appear within seconds; "
        "the API shows a vector table's partition as `dagster_partition`.",
    )
    error.message = f"No vector table has the partition {partition_key!r}."
    return error


def _missing_tags(runtime: Runtime, task_id: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that a run of the API or the sensor has from its launch on, for one that was launched elsewhere.

    A run that is executed again has copies of the tags of the run before it: they are replaced if they are wrong.
    """
    with runtime.catalog.transaction() as session:
        task = tasks.find(session, task_id)
        table = vector_tables.find(session, task.target_id) if task is not None else None
    if task is None or table is None:
        return {}
    wanted = {NAME_TAG: table.name, TASK_TYPE_TAG: task.task_type}
    return {key: value for key, value in wanted.items() if tags.get(key) != value}


def _mode(context: dg.AssetExecutionContext, config: VectorTableConfig) -> RunMode:
    tagged = context.run.tags.get(MODE_TAG)
    return config.mode if tagged is None else RunMode(tagged)


def _data_version(context: dg.AssetExecutionContext, report: RunReport) -> dg.DataVersion:
    """The one before, where the run changed nothing."""
    before = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[context.partition_key]), limit=1
    )
    materialization = before.records[0].asset_materialization if before.records else None
    tags = materialization.tags if materialization else None
    return data_version(report, (tags or {}).get("dagster/data_version"))
