"""Reads both sides for a tick: some ten statements, however many vector tables there are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import dagster as dg
from dagster._core.execution.backfill import BulkActionsFilter
from sqlalchemy.orm import Session

from embedd_dagster.catalog import due_tables, resyncs, run_heartbeats, tasks
from embedd_dagster.catalog import partitions as catalog_partitions
from embedd_dagster.catalog.clock import database_now
from embedd_dagster.catalog.tables import Task
from embedd_dagster.core.fairness import QueuePlace
from embedd_dagster.core.run_names import JOB_NAME, PARTITION_TAG, TASK_TAG
from embedd_dagster.core.status import TaskStatus, TaskType
from embedd_dagster.defs.backfills import ASSET_KEY, GivenUpWork, read_backfills
from embedd_dagster.defs.liveness import CODE_SERVER_STARTED_AT, LifeSigns
from embedd_dagster.defs.partitions import vector_tables as partitions
from embedd_dagster.defs.reconcile.plan import IN_FLIGHT, RunFact, Snapshot, TaskFact
from embedd_dagster.defs.stopping import GIVEN_UP_BACKFILL
from embedd_dagster.defs.tags import BACKFILL_TAG, CANCELLED_BY_TAG
from embedd_dagster.engine.runtime import Runtime

_TAG_VALUES_AT_ONCE = 500
_RESYNCS_AT_ONCE = 100
_PLACES_PER_QUERY = 1000


@dataclass(slots=True)
class Memory:
    """What one process remembers from tick to tick. Losing it makes the sensor more patient, never wrong."""

    done_backfills: set[str] = field(default_factory=set)
    """Backfills that Dagster gave up, and of which nothing is left to do."""
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


def observe(instance: dg.DagsterInstance, runtime: Runtime, memory: Memory) -> Snapshot:
    """Both sides. Raises when one of them cannot be read: that is not the same as empty."""
    # runs first: what is snapshot in flight here has its task in the catalog already, or no longer
    in_flight = _runs(instance, dg.RunsFilter(statuses=sorted(IN_FLIGHT, key=lambda status: status.value)))
    partition_keys = frozenset(instance.get_dynamic_partitions(partitions.name or ""))
    backfills = read_backfills(instance, memory.done_backfills)
    with runtime.catalog.transaction() as session:
        now = database_now(session)
        live = tuple(_task_fact(task) for task in tasks.live_tasks(session))
        wanted = catalog_partitions.present_keys(session)
        awaiting = tuple(table.id for table in due_tables.awaiting_rebackfill(session))
        resync = tuple(resyncs.due(session, _RESYNCS_AT_ONCE))
        given_up = _still_to_do(session, backfills.given_up, wanted)
        waiting = {*(task.vector_table_id for task in live), *awaiting, *(one.vector_table_id for one in resync)}
        places = _places(session, sorted(waiting | {work.vector_table_id for work in given_up}))
        heartbeats = run_heartbeats.latest(session, [run.run_id for run in in_flight])
    memory.done_backfills |= backfills.finished_ids - {work.backfill_id for work in given_up}
    instant = time.monotonic()
    stale_after = runtime.settings.stale_after_seconds
    memory.note_read(instant, stale_after / 2)
    return Snapshot(
        now=now,
        wanted_partitions=wanted,
        awaiting_rebackfill=awaiting,
        pending_resyncs=resync,
        tasks=live,
        partition_keys=partition_keys,
        runs_in_flight=tuple(
            replace(run, signs=replace(run.signs, heartbeat_at=heartbeats.get(run.run_id))) for run in in_flight
        ),
        runs_ended=_ended_runs(instance, live, in_flight),
        places=places,
        targeted_keys=backfills.targeted_keys,
        given_up=given_up,
        cancelled_alone=backfills.cancelled_runs,
        code_server_started_at=CODE_SERVER_STARTED_AT,
        silence_counts=memory.has_watched_for(instant, stale_after),
    )


def _still_to_do(session: Session, works: Iterable[GivenUpWork], wanted: Mapping[str, str]) -> tuple[GivenUpWork, ...]:
    """Of what given-up backfills left, that for which no task was created since, by a run of theirs or anybody."""
    # the key was the id until version 0013 of the catalog, and a backfill of that time still has it
    by_key = {key: key for key in wanted} | {partition_key: key for key, partition_key in wanted.items()}
    left = [replace(work, vector_table_id=by_key[work.partition_key]) for work in works if work.partition_key in by_key]
    never_built = due_tables.never_built(session, {work.vector_table_id for work in left if work.is_sync})
    left = [work for work in left if not (work.is_sync and work.vector_table_id in never_built)]
    begun: set[tuple[str, bool]] = set()
    for is_sync in {work.is_sync for work in left}:
        # the latest request counts: a task created since it does what the earlier ones asked for, too
        since: dict[str, datetime] = {}
        for work in left:
            if work.is_sync is is_sync:
                since[work.vector_table_id] = max(work.requested_at, since.get(work.vector_table_id, work.requested_at))
        found = tasks.targets_begun_since(session, since, builds=not is_sync)
        begun |= {(vector_table_id, is_sync) for vector_table_id in found}
    unique = {(work.vector_table_id, work.is_sync): work for work in left}
    return tuple(work for key, work in unique.items() if key not in begun)


def _places(session: Session, vector_table_ids: list[str]) -> dict[str, QueuePlace]:
    places: dict[str, QueuePlace] = {}
    for start in range(0, len(vector_table_ids), _PLACES_PER_QUERY):
        places |= catalog_partitions.queue_places(session, vector_table_ids[start : start + _PLACES_PER_QUERY])
    return places


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
        if run.job_name == JOB_NAME or ASSET_KEY in (run.asset_selection or ()):
            facts.append(_run_fact(record))
    return _with_given_up(instance, facts)


def _run_fact(record: dg.RunRecord) -> RunFact:
    tags = record.dagster_run.tags
    return RunFact(
        run_id=record.dagster_run.run_id,
        status=record.dagster_run.status,
        task_id=tags.get(TASK_TAG),
        partition_key=tags.get(PARTITION_TAG),
        ended_at=_instant(record.end_time),
        signs=life_signs(record),
        backfill_id=None if CANCELLED_BY_TAG in tags else tags.get(BACKFILL_TAG),
    )


def life_signs(record: dg.RunRecord) -> LifeSigns:
    """What Dagster knows of when the run was last heard of."""
    return LifeSigns(
        created_at=record.create_timestamp.replace(tzinfo=UTC),
        changed_at=record.update_timestamp.replace(tzinfo=UTC),
        started_at=_instant(record.start_time),
    )


def _instant(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _with_given_up(instance: dg.DagsterInstance, runs: list[RunFact]) -> list[RunFact]:
    """Marks the runs that Dagster cancelled only because it gave up their backfill."""
    ids = sorted({run.backfill_id for run in runs if run.backfill_id and run.was_cancelled_by_somebody})
    if not ids:
        return runs
    found = instance.get_backfills(filters=BulkActionsFilter(backfill_ids=ids))
    given_up = {backfill.backfill_id for backfill in found if backfill.status in GIVEN_UP_BACKFILL}
    return [replace(run, given_up=run.backfill_id in given_up) for run in runs]


def _task_fact(task: Task) -> TaskFact:
    return TaskFact(
        task_id=task.id,
        vector_table_id=task.target_id,
        task_type=TaskType(task.task_type),
        status=TaskStatus(task.status),
        attempts=task.attempts,
        max_attempts=task.max_attempts,
        handed_back=task.handed_back,
        cancel_requested=task.cancel_requested,
        created_at=task.created_at,
        run_id=task.dagster_run_id,
        heartbeat_at=task.heartbeat_at,
    )
