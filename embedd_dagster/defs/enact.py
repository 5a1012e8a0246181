"""Carries out a plan of `reconcile`: each part by itself, each checked again under a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import dagster as dg
from sqlalchemy.orm import Session

from embedd_dagster.catalog import partitions, tasks, vector_tables
from embedd_dagster.catalog.partitions import RunLabel
from embedd_dagster.catalog.resyncs import OwedSync
from embedd_dagster.catalog.tables import Task
from embedd_dagster.core.status import SyncStatus, TaskType
from embedd_dagster.defs.former_partitions import move_history
from embedd_dagster.defs.reconcile import IN_FLIGHT, Plan, RunDecision, TaskDecision, TaskFact, Verdict
from embedd_dagster.defs.tags import NAME_TAG, PARTITION_TAG, TASK_TAG, TASK_TYPE_TAG
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import CatalogUnavailable, Conflict


@dataclass(frozen=True, slots=True)
class Enactor:
    """Access to both sides, for one tick."""

    instance: dg.DagsterInstance
    runtime: Runtime
    log: Callable[[str], None]

    def enact(self, plan: Plan) -> list[dg.RunRequest]:
        """Does what is planned, and gives the runs to launch. What fails for one table is left for the next tick.

        Raises CatalogUnavailable: without the catalog nothing can be done for any table.
        """
        requests: list[dg.RunRequest] = []
        labels = self._labels([one.task.vector_table_id for one in plan.tasks if one.verdict is Verdict.LAUNCH])
        for decision in plan.tasks:
            if decision.verdict is Verdict.LAUNCH:
                fact = decision.task
                if label := labels.get(fact.vector_table_id):
                    requests.append(run_request(fact.task_id, label, fact.task_type, decision.run_key or fact.task_id))
            else:
                with self._alone(decision.task.vector_table_id):
                    self._settle(decision)
        for run in plan.runs:
            with self._alone(f"run {run.run_id}"):
                self._end(run)
        for vector_table_id in plan.rebackfills:
            with self._alone(vector_table_id):
                requests += self._begin_rebackfill(vector_table_id)
        for owed in plan.syncs:
            with self._alone(owed.vector_table_id):
                requests += self._begin_owed_sync(owed)
        return requests

    def _labels(self, vector_table_ids: list[str]) -> dict[str, RunLabel]:
        if not vector_table_ids:
            return {}
        with self.runtime.catalog.transaction() as session:
            return partitions.run_labels(session, vector_table_ids)

    def move_partitions(self, plan: Plan) -> list[str]:
        """Moves the history of partitions that were named by an id; gives the keys whose history could be moved."""
        moved = []
        for old_key, new_key in plan.partitions_to_move.items():
            with self._alone(old_key):
                move_history(self.instance, old_key, new_key)
                moved.append(old_key)
        return moved

    @contextmanager
    def _alone(self, subject: str) -> Iterator[None]:
        try:
            yield
        except CatalogUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - one vector table must not stop the others
            self.log(f"{subject}: {type(error).__name__}; tried again at the next tick.")

    def _settle(self, decision: TaskDecision) -> None:
        fact = decision.task
        with self.runtime.catalog.transaction() as session:
            task = tasks.find(session, fact.task_id, lock=True)
            if task is None or not _unchanged(task, fact):
                return  # it went on by itself since it was observed
            if decision.ends is not None:
                self._end(decision.ends)  # before the commit: died in between, the next tick finds the task as it was
            _apply(session, task, decision)
        self.log(f"{fact.vector_table_id}, task {fact.task_id}: {decision.verdict.value}. {decision.reason}")

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

    def _begin_rebackfill(self, vector_table_id: str) -> list[dg.RunRequest]:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, vector_table_id, lock=True)
            if table is None or table.sync_status != SyncStatus.PENDING_REBACKFILL.value or table.is_held:
                return []
            try:
                task = tasks.create(
                    session, table, TaskType.REBACKFILL, max_attempts=self.runtime.settings.max_task_attempts
                )
            except Conflict:
                return []  # somebody was faster
            task_id, label = task.id, RunLabel.of(table)
        return [run_request(task_id, label, TaskType.REBACKFILL, f"{task_id}:0")]

    def _begin_owed_sync(self, owed: OwedSync) -> list[dg.RunRequest]:
        with self.runtime.catalog.transaction() as session:
            table = vector_tables.find(session, owed.vector_table_id, lock=True)
            if table is None or table.deleted_at is not None or table.paused or table.live_version is None:
                return []
            try:
                task = tasks.create(
                    session,
                    table,
                    TaskType.SYNC,
                    max_attempts=self.runtime.settings.max_task_attempts,
                    options={**owed.options, "reason": owed.reason},
                )
            except Conflict:
                return []  # somebody was faster
            task_id, label = task.id, RunLabel.of(table)
        self.log(f"{owed.vector_table_id}, task {task_id}: sync. {owed.reason}")
        return [run_request(task_id, label, TaskType.SYNC, f"{task_id}:0")]


def run_request(task_id: str, label: RunLabel, task_type: TaskType, run_key: str) -> dg.RunRequest:
    """A run of the job for a task."""
    mode = "sync" if task_type is TaskType.SYNC else "backfill"
    return dg.RunRequest(
        run_key=run_key,
        partition_key=label.partition_key,
        # with Dagster's own tag it is taken as it is: one whose partition has just gone would fail the tick for all
        tags={
            TASK_TAG: task_id,
            PARTITION_TAG: label.partition_key,
            NAME_TAG: label.name,
            TASK_TYPE_TAG: task_type.value,
        },
        run_config={"ops": {"vector_table": {"config": {"mode": mode}}}},
    )


def _apply(session: Session, task: Task, decision: TaskDecision) -> None:
    match decision.verdict:
        case Verdict.REQUEUE:
            tasks.fail(session, task, decision.reason, retry=True)
        case Verdict.GIVE_UP:
            tasks.fail(session, task, decision.reason, retry=False)
        case Verdict.CANCEL:
            tasks.cancel(session, task, decision.reason)
        case Verdict.ASK_TO_END:
            tasks.request_cancel(session, task)
        case Verdict.LAUNCH:
            pass


def _unchanged(task: Task, fact: TaskFact) -> bool:
    return (task.status, task.dagster_run_id, task.attempts, task.heartbeat_at, task.cancel_requested) == (
        fact.status.value,
        fact.run_id,
        fact.attempts,
        fact.heartbeat_at,
        fact.cancel_requested,
    )
