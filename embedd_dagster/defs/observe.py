"""Reads both sides for a tick: some ten statements, however many vector tables there are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import dagster as dg

from embedd_dagster.catalog import partitions as catalog_partitions
from embedd_dagster.catalog import resyncs, tasks, vector_tables
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.catalog.tables import Task
from embedd_dagster.core.status import TaskStatus, TaskType
from embedd_dagster.defs.partitions import vector_tables as partitions
from embedd_dagster.defs.reconcile import IN_FLIGHT, Observation, RunFact, TaskFact, idle_runs
from embedd_dagster.defs.tags import PARTITION_TAG, TASK_TAG
from embedd_dagster.engine.runtime import Runtime

ASSET_KEY = dg.AssetKey("vector_table")
JOB_NAME = "vector_table_job"
_TAG_VALUES_AT_ONCE = 500
_OWED_SYNCS_AT_ONCE = 100


@dataclass(slots=True)
class Memory:
    """What one process remembers from tick to tick. Losing it makes the sensor more patient, never wrong."""

    idle_since: dict[str, float] = field(default_factory=dict)
    read_at: float | None = None
    """When both sides were last read."""
    watching_since: float | None = None
    """The end of the last gap in reading, or None where there was none: in a gap, no heartbeat may have got through."""

    def note_read(self, instant: float, longest_gap_seconds: float) -> None:
        """Remembers that both sides could be read."""
        if self.read_at is not None and instant - self.read_at > longest_gap_seconds:
            self.watching_since = instant
        self.read_at = instant

    def note_failure(self, instant: float) -> None:
        """Remembers that a side could not be read."""
        self.watching_since = self.read_at = instant

    def has_watched_for(self, instant: float, seconds: float) -> bool:
        """Whether no gap ended within these last seconds."""
        return self.watching_since is None or instant - self.watching_since > seconds

    def note_idle(self, run_ids: Iterable[str], instant: float) -> dict[str, float]:
        """For how long each of these runs has been seen to own nothing; forgets all others."""
        self.idle_since = {run_id: self.idle_since.get(run_id, instant) for run_id in run_ids}
        return {run_id: instant - since for run_id, since in self.idle_since.items()}


def observe(instance: dg.DagsterInstance, runtime: Runtime, memory: Memory) -> Observation:
    """Both sides. Raises when one of them cannot be read: that is not the same as empty."""
    # runs first: what is seen in flight here has its task in the catalog already, or no longer
    in_flight = _runs(instance, dg.RunsFilter(statuses=sorted(IN_FLIGHT, key=lambda status: status.value)))
    partition_keys = frozenset(instance.get_dynamic_partitions(partitions.name or ""))
    with runtime.catalog.transaction() as session:
        now = database_now(session)
        live = tuple(_task_fact(task) for task in tasks.live_tasks(session))
        wanted = catalog_partitions.present_keys(session)
        awaiting = tuple(table.id for table in vector_tables.awaiting_rebackfill(session))
        owed = tuple(resyncs.owed(session, _OWED_SYNCS_AT_ONCE))
    instant = time.monotonic()
    stale_after = runtime.settings.stale_after_seconds
    memory.note_read(instant, stale_after / 2)
    seen = Observation(
        now=now,
        wanted_partitions=wanted,
        awaiting_rebackfill=awaiting,
        owed_syncs=owed,
        tasks=live,
        partition_keys=partition_keys,
        runs_in_flight=tuple(in_flight),
        runs_ended=_ended_runs(instance, live, in_flight),
        silence_counts=memory.has_watched_for(instant, stale_after),
    )
    return replace(seen, idle_seconds=memory.note_idle(idle_runs(seen), instant))


def _ended_runs(
    instance: dg.DagsterInstance, live: Iterable[TaskFact], in_flight: Iterable[RunFact]
) -> Mapping[str, list[RunFact]]:
    """By task, oldest first, for live tasks without a run in flight (for running ones: without their own)."""
    flying_tasks = {run.task_id for run in in_flight}
    flying_runs = {run.run_id for run in in_flight}
    asked = [
        task.task_id
        for task in live
        if (task.run_id not in flying_runs if task.status is TaskStatus.RUNNING else task.task_id not in flying_tasks)
    ]
    ended: dict[str, list[RunFact]] = {}
    for start in range(0, len(asked), _TAG_VALUES_AT_ONCE):
        some = asked[start : start + _TAG_VALUES_AT_ONCE]
        for run in _runs(instance, dg.RunsFilter(tags={TASK_TAG: some})):
            if run.task_id is not None:
                ended.setdefault(run.task_id, []).append(run)
    return ended


def _runs(instance: dg.DagsterInstance, runs_filter: dg.RunsFilter) -> list[RunFact]:
    """The asset's runs that pass the filter, oldest first; runs of other code locations are none of ours."""
    facts = []
    for record in instance.get_run_records(runs_filter, ascending=True):
        run = record.dagster_run
        if run.job_name != JOB_NAME and ASSET_KEY not in (run.asset_selection or ()):
            continue
        facts.append(
            RunFact(
                run_id=run.run_id,
                status=run.status,
                task_id=run.tags.get(TASK_TAG),
                partition_key=run.tags.get(PARTITION_TAG),
                created_at=record.create_timestamp.replace(tzinfo=UTC),
                ended_at=None if record.end_time is None else datetime.fromtimestamp(record.end_time, UTC),
            )
        )
    return facts


def _task_fact(task: Task) -> TaskFact:
    return TaskFact(
        task_id=task.id,
        vector_table_id=task.target_id,
        task_type=TaskType(task.task_type),
        status=TaskStatus(task.status),
        attempts=task.attempts,
        max_attempts=task.max_attempts,
        cancel_requested=task.cancel_requested,
        created_at=task.created_at,
        run_id=task.dagster_run_id,
        heartbeat_at=task.heartbeat_at,
    )
