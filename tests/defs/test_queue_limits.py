"""The limits of `dagster.yaml`, as the queue daemon of Dagster applies them to the tags of our runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.test_utils import instance_for_test
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from embedd_dagster.core.fairness import QueuePlace, queue_tags
from embedd_dagster.core.status import TaskType
from embedd_dagster.definitions import defs
from tests.defs.conftest import ORIGIN

CONFIGURATION = Path(__file__).parents[2] / "dagster.yaml"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    given = yaml.safe_load(CONFIGURATION.read_text())
    with instance_for_test(overrides={"concurrency": given["concurrency"]}) as made:
        # as the first run of the pool does
        made.event_log_storage.initialize_concurrency_limit_to_default("vector_tables")
        yield made


class Queue:
    """Dagster's queue: real records, and the daemon's own choice."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._job = defs.resolve_job_def("vector_table_job")
        self._count = 0

    def add(self, kind: str, environment: str, provider: str, times: int = 1) -> None:
        task_type = TaskType.SYNC if kind == "sync" else TaskType.BACKFILL
        for _ in range(times):
            self._count += 1
            tags = queue_tags(task_type, QueuePlace("org", environment, provider, 10))
            self._instance.create_run_for_job(
                self._job,
                status=dg.DagsterRunStatus.QUEUED,
                tags={**tags, "dagster/partition": f"vt_{self._count}", "kind": f"{kind} of {environment}"},
                remote_job_origin=ORIGIN,
                job_code_origin=None,
            )

    def started(self) -> Counter[str]:
        """The runs that the daemon would start now."""
        with QueuedRunCoordinatorDaemon(interval_seconds=1) as daemon:
            chosen = daemon._get_runs_to_dequeue(self._instance, self._instance.get_concurrency_config(), None)
        return Counter(run.tags["kind"] for run in chosen)


@pytest.fixture
def queue(instance: dg.DagsterInstance) -> Queue:
    return Queue(instance)


def test_backfills_of_one_environment_leave_room_for_others_and_for_short_syncs(queue: Queue) -> None:
    queue.add("backfill", "a", "p1", times=20)
    queue.add("backfill", "b", "p2", times=3)
    queue.add("sync", "a", "p1")
    assert queue.started() == {"backfill of a": 4, "backfill of b": 1, "sync of a": 1}


def test_tables_of_one_provider_leave_room_for_others(queue: Queue) -> None:
    for environment in "abcdef":
        queue.add("backfill", environment, "dead")
    queue.add("backfill", "g", "alive")
    started = queue.started()
    assert (started.total(), started["backfill of g"]) == (5, 1)


def test_a_stream_of_short_syncs_leaves_room_for_backfills(queue: Queue) -> None:
    queue.add("sync", "a", "p1", times=20)
    queue.add("backfill", "a", "p1", times=3)
    assert queue.started() == {"sync of a": 4, "backfill of a": 2}


def test_runs_of_one_vector_table_never_overlap(queue: Queue, instance: dg.DagsterInstance) -> None:
    queue.add("backfill", "a", "p1")
    queue._count = 0
    queue.add("sync", "a", "p1")
    assert queue.started().total() == 1
