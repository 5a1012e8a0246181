"""Carries out a plan of `reconcile`: each part by itself, each checked again under a lock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import dagster as dg
from sqlalchemy.orm import Session

from embedd_dagster.catalog import partitions, tasks, vector_tables
from embedd_dagster.catalog.partitions import RunLabel
from embedd_dagster.catalog.resyncs import PendingResync
from embedd_dagster.catalog.tables import Task
from embedd_dagster.core.fairness import QueuePlace, queue_tags
from embedd_dagster.core.run_names import run_config, run_tags
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.defs.backfills import GivenUpWork
from embedd_dagster.defs.former_partitions import move_history
from embedd_dagster.defs.reconcile.plan import IN_FLIGHT, Decision, Plan, RunDecision, TaskDecision, TaskFact
from embedd_dagster.defs.tags import CANCELLED_BY_TAG
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, Conflict

_CLEANUP_ORDER: Final = (Decision.REQUEUE, Decision.ASK_TO_END, Decision.CANCEL, Decision.GIVE_UP)


@dataclass(frozen=True, slots=True)
class PlanExecutor:
    """Access to both sides, for one tick, and the tick's deadline."""

    instance: dg.DagsterInstance
    runtime: Runtime
    log: Callable[[str], None]
    until: float = math.inf
    clock: Callable[[], float] = time.monotonic

    def apply(self, plan: Plan, places: Mapping[str, QueuePlace]) -> list[dg.RunRequest]:
        """Does what is planned, and gives the runs to launch. What fails for one table is left for the next tick.

        What launches runs comes first; what only cleans up is done until the deadline, and the rest at the next ticks. What
        took longer than Dagster waits for a tick would be lost with all its launches.

        Raises CatalogUnavailable: without the catalog nothing can be done for any table.
        """
        for run_id in plan.cancelled_alone:  # before anything is made of it, while it can still be told
            self.instance.add_run_tags(run_id, {CANCELLED_BY_TAG: "somebody"})
        requests = self._launches(plan, places)
        for subject, begin in self._beginnings(plan, places):
            if self._is_out_of_time():
                break
            with self._isolate_errors(subject):
                requests += begin()
        left = 0
        for subject, act in self._clean_up(plan):
            if self._is_out_of_time():
                left += 1
                continue
            with self._isolate_errors(subject):
                act()
        if left:
            self.log(f"{left} tasks and runs are left for the next tick.")
        return requests

    def move_partitions(self, plan: Plan) -> list[str]:
        """Moves the history of partitions that were named by an id; gives the keys whose history was moved in time."""
        moved: list[str] = []
        for old_key, new_key in plan.partitions_to_move.items():
            if self._is_out_of_time():
                self.log(f"{len(plan.partitions_to_move) - len(moved)} partitions are left for the next tick.")
                break
            with self._isolate_errors(old_key):
                move_history(self.instance, old_key, new_key)
                moved.append(old_key)
        return moved

    def _is_out_of_time(self) -> bool:
        return self.clock() >= self.until

    def _launches(self, plan: Plan, places: Mapping[str, QueuePlace]) -> list[dg.RunRequest]:
        facts = [(one.task, one.run_key) for one in plan.tasks if one.action is Decision.LAUNCH]
        if not facts:
            return []
        with self.runtime.catalog.transaction() as session:
            labels = partitions.run_labels(session, [task.vector_table_id for task, _ in facts])
        return [
            run_request(
                task.task_id,
                labels[task.vector_table_id],
                task.task_type,
                run_key or task.task_id,
                places.get(task.vector_table_id, QueuePlace()),
            )
            for task, run_key in facts
            if task.vector_table_id in labels
        ]

    def _beginnings(
        self, plan: Plan, places: Mapping[str, QueuePlace]
    ) -> Iterator[tuple[str, Callable[[], list[dg.RunRequest]]]]:
        for vector_table_id in plan.rebackfills:
            place = places.get(vector_table_id, QueuePlace())
            yield vector_table_id, partial(self._begin_rebackfill, vector_table_id, place)
        for resync in plan.syncs:
            place = places.get(resync.vector_table_id, QueuePlace())
            yield resync.vector_table_id, partial(self._begin_resync, resync, place)
        for work in plan.given_up:
            place = places.get(work.vector_table_id, QueuePlace())
            yield work.vector_table_id, partial(self._begin_given_up, work, place)

    def _clean_up(self, plan: Plan) -> Iterator[tuple[str, Callable[[], None]]]:
        for action in _CLEANUP_ORDER:
            for decision in plan.tasks:
                if decision.action is action:
                    yield decision.task.vector_table_id, partial(self._apply_decision, decision)
        for run in sorted(plan.runs, key=lambda run: run.cancelled):  # those first that hold a slot
            yield f"run {run.run_id}", partial(self._end, run)

    @contextmanager
    def _isolate_errors(self, subject: str) -> Iterator[None]:
        try:
            yield
        except CatalogUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - one vector table must not stop the others
            self.log(f"{subject}: {type(error).__name__}; tried again at the next tick.")

    def _apply_decision(self, decision: TaskDecision) -> None:
        fact = decision.task
        with self.runtime.catalog.transaction() as session:
            task = tasks.find(session, fact.task_id, lock=True)
            if task is None or not _unchanged(task, fact):
                return  # it went on by itself since it was observed
            if decision.ends is not None:
                self._end(decision.ends)  # before the commit: died in between, the next tick finds the task as it was
            _apply(session, task, decision)
        self.log(f"{fact.vector_table_id}, task {fact.task_id}: {decision.action.value}. {decision.reason}")

    def _end(self, decision: RunDecision) -> None:
        run = self.instance.get_run_by_id(decision.run_id)
        if run is None or run.status not in IN_FLIGHT:
            return
        # where its process is there after all, it is told; where it is not, this fails in one of several ways
        with suppress(Exception):
            self.instance.run_coordinator.cancel_run(decision.run_id)
        run = self.instance.get_run_by_id(decision.run_id)
        if run is None or run.status not in IN_FLIGHT:
            return
        if decision.cancelled:
            self.instance.report_run_canceled(run, message=decision.reason)
        else:
            self.instance.report_run_failed(run, message=decision.reason)

    def _begin_rebackfill(self, vector_table_id: str, place: QueuePlace) -> list[dg.RunRequest]:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, vector_table_id, lock=True)
            if table is None or table.sync_status != SyncStatus.PENDING_REBACKFILL.value or table.is_rebuild_suppressed:
                return []
            try:
                task = tasks.create(
                    session, table, TaskType.REBACKFILL, max_attempts=self.runtime.settings.max_task_attempts
                )
            except Conflict:
                return []  # somebody was faster
            task_id, label = task.id, RunLabel.of(table)
        return [run_request(task_id, label, TaskType.REBACKFILL, f"{task_id}:0", place)]

    def _begin_resync(self, resync: PendingResync, place: QueuePlace) -> list[dg.RunRequest]:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, resync.vector_table_id, lock=True)
            if table is None or table.deleted_at is not None or table.paused or table.live_version is None:
                return []
            try:
                task = tasks.create(
                    session,
                    table,
                    TaskType.SYNC,
                    max_attempts=self.runtime.settings.max_task_attempts,
                    options={**resync.options, "reason": resync.reason},
                )
            except Conflict:
                return []  # somebody was faster
            task_id, label = task.id, RunLabel.of(table)
        self.log(f"{resync.vector_table_id}, task {task_id}: sync. {resync.reason}")
        return [run_request(task_id, label, TaskType.SYNC, f"{task_id}:0", place)]

    def _begin_given_up(self, work: GivenUpWork, place: QueuePlace) -> list[dg.RunRequest]:
        reason = f"Dagster gave up backfill {work.backfill_id}, which was to do this."
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, work.vector_table_id, lock=True)
            if table is None or table.deleted_at is not None or (work.is_sync and table.live_version is None):
                return []
            built = TaskType.BACKFILL if table.live_version is None else TaskType.REBACKFILL
            task_type = TaskType.SYNC if work.is_sync else built
            try:
                task = tasks.create(
                    session,
                    table,
                    task_type,
                    max_attempts=self.runtime.settings.max_task_attempts,
                    options={**work.options, "reason": reason},
                )
            except Conflict:
                return []  # somebody was faster
            task_id, label = task.id, RunLabel.of(table)
        self.log(f"{work.vector_table_id}, task {task_id}: {task_type.value}. {reason}")
        return [run_request(task_id, label, task_type, f"{task_id}:0", place)]


def run_request(task_id: str, label: RunLabel, task_type: TaskType, run_key: str, place: QueuePlace) -> dg.RunRequest:
    """A run of the job for a task."""
    return dg.RunRequest(
        run_key=run_key,
        partition_key=label.partition_key,
        # with Dagster's own tag the key is not looked up: a partition that has just been deleted would fail the whole tick
        tags={
            **run_tags(task_id, label.partition_key, label.name, task_type),
            **queue_tags(task_type, place),
        },
        run_config=run_config(task_type),
    )


def _apply(session: Session, task: Task, decision: TaskDecision) -> None:
    match decision.action:
        case Decision.REQUEUE if not decision.is_attempt:
            tasks.hand_back(session, task, decision.reason)
        case Decision.REQUEUE:
            tasks.fail(session, task, decision.reason, retry=True)
        case Decision.GIVE_UP:
            tasks.fail(session, task, decision.reason, retry=False)
        case Decision.CANCEL:
            tasks.cancel(session, task, decision.reason)
        case Decision.ASK_TO_END:
            tasks.request_cancel(session, task)
        case Decision.LAUNCH:
            pass


def _unchanged(task: Task, fact: TaskFact) -> bool:
    return (task.status, task.dagster_run_id, task.attempts, task.heartbeat_at, task.cancel_requested) == (
        fact.status.value,
        fact.run_id,
        fact.attempts,
        fact.heartbeat_at,
        fact.cancel_requested,
    )
