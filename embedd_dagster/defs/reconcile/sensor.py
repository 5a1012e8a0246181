"""The sensor `reconcile`. Level-triggered, without a cursor: what one tick misses, the next one sees."""

import time
from collections.abc import Callable
from datetime import timedelta

import dagster as dg

from embedd_dagster.defs.jobs import vector_table_job
from embedd_dagster.defs.partitions import vector_tables as partitions
from embedd_dagster.defs.reconcile.apply import PlanExecutor
from embedd_dagster.defs.reconcile.observe import Memory, observe
from embedd_dagster.defs.reconcile.plan import Decision, Limits, Plan, plan
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.defs.tick_logs import tick_log
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, ConfigurationError

_INTERVAL_SECONDS = 2  # the daemon's loop makes it five
_RECONCILE_SECONDS = 10.0  # of the sixty that a tick may take; runs are launched after the tick

_memory = Memory()


@dg.sensor(
    job=vector_table_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Makes Dagster what the catalog says: partitions are the vector tables, a task without a run gets one, a task "
        "whose run died is queued again, a configuration newer than what is live is built."
    ),
)
def reconcile_sensor(context: dg.SensorEvaluationContext, runtime: RuntimeResource) -> dg.SensorResult | dg.SkipReason:
    """Observe, plan, enact; the decisions are in `reconcile`. Never talks to a source or a store."""
    return reconcile(context.instance, runtime.open, _memory, tick_log(context))


def reconcile(
    instance: dg.DagsterInstance,
    open_runtime: Callable[[], Runtime],
    memory: Memory,
    log: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dg.SensorResult | dg.SkipReason:
    """One tick."""
    until = clock() + _RECONCILE_SECONDS
    try:
        runtime = open_runtime()
        limits = Limits(stale_after=timedelta(seconds=runtime.settings.stale_after_seconds))
        executor = PlanExecutor(instance, runtime, log, until, clock)
        snapshot = observe(instance, runtime, memory)
        planned = plan(snapshot, limits)
        requests = executor.apply(planned, snapshot.places)
        requeued = {decision.task.task_id for decision in planned.tasks if decision.action is Decision.REQUEUE}
        if requeued and clock() < until:  # they are judged once more: the next tick is five seconds away
            snapshot = observe(instance, runtime, memory)
            launches = [one for one in plan(snapshot, limits).tasks if one.action is Decision.LAUNCH]
            chosen = tuple(one for one in launches if one.task.task_id in requeued)
            requests += executor.apply(Plan(tasks=chosen), snapshot.places)
        moved = executor.move_partitions(planned)
    except (CatalogUnavailable, ConfigurationError) as error:
        memory.note_failure(time.monotonic())
        return dg.SkipReason(f"{error.message} {error.resolution}")
    changes: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
    if planned.partitions_to_add:
        changes.append(partitions.build_add_request(list(planned.partitions_to_add)))
    to_delete = [key for key in planned.partitions_to_delete if key in moved or key not in planned.partitions_to_move]
    if to_delete:
        changes.append(partitions.build_delete_request(to_delete))
    if not requests and not changes:
        return dg.SkipReason("The catalog and Dagster agree.")
    return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=changes)
