"""Asks Dagster, in the background, to launch or end a run at once; nothing depends on it.

The task is in the catalog before this is called. If Dagster is down, the sensor `reconcile` launches the run later, so a
failure here is only logged. Plain HTTP, so that the API's process never imports Dagster.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import structlog
from pydantic import SecretStr

from embedd_dagster.catalog import partitions, tasks
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.partitions import RunLabel
from embedd_dagster.core import run_names
from embedd_dagster.core.fairness import QueuePlace, queue_tags
from embedd_dagster.core.status import TaskType
from embedd_dagster.errors import EmbeddError, OrchestratorUnavailable

LAUNCH: Final = """mutation LaunchRun($executionParams: ExecutionParams!) {
  launchRun(executionParams: $executionParams) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
  }
}"""
TERMINATE: Final = """mutation TerminateRun($runId: String!) {
  terminateRun(runId: $runId) { __typename }
}"""
_TIMEOUT_SECONDS: Final = 5.0
_MAX_WAITING: Final = 200
_MAX_WAITING_TASKS: Final = 4
"""The tasks of an environment with more pending tasks are left to the sensor, which launches them in turn with those of other
environments: Dagster's queue is first come, first served."""
_log = structlog.get_logger("embedd.api")


class Launcher:
    """Sends launches and terminations to Dagster's webserver, two at a time."""

    def __init__(self, catalog: Catalog, dagster_url: str | None, dagster_token: SecretStr | None = None) -> None:
        """Without a URL nothing is sent, and the sensor works alone. The token passes the webserver's login."""
        self._catalog = catalog
        self._url = dagster_url.rstrip("/") if dagster_url else None
        headers = {"Authorization": f"Bearer {dagster_token.get_secret_value()}"} if dagster_token else {}
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False)
        self._workers = ThreadPoolExecutor(2, "launch")
        self._waiting = threading.BoundedSemaphore(_MAX_WAITING)

    def launch(self, task_id: str, vector_table_id: str, label: RunLabel, task_type: TaskType) -> None:
        """Launches a run for a pending task, in the background."""
        _log.info("task queued", task_id=task_id, vector_table_id=vector_table_id, task_type=task_type.value)
        self._later("launch", task_id, lambda: self._launch(task_id, vector_table_id, label, task_type))

    def terminate(self, run_id: str) -> None:
        """Ends a run, in the background."""
        _log.info("run to be ended", run_id=run_id)
        self._later("terminate", run_id, lambda: self._send(TERMINATE, {"runId": run_id}, "terminateRun"))

    def _later(self, what: str, subject: str, action: Callable[[], object]) -> None:
        if self._url is None:
            return
        if not self._waiting.acquire(blocking=False):
            _log.warning("dagster not told", what=what, subject=subject, reason="too many are waiting")
            return

        def act() -> None:
            try:
                action()
            except EmbeddError as error:
                _log.warning("dagster not told", what=what, subject=subject, reason=error.message)
            finally:
                self._waiting.release()

        try:
            # in the request's context, so that its id is in the log
            self._workers.submit(contextvars.copy_context().run, act)
        except RuntimeError:  # shutting down
            self._waiting.release()

    def _launch(self, task_id: str, vector_table_id: str, label: RunLabel, task_type: TaskType) -> None:
        with self._catalog.transaction() as session:
            place = partitions.queue_places(session, [vector_table_id]).get(vector_table_id, QueuePlace())
            waiting = tasks.count_waiting(session, place.environment_id)
        if waiting > _MAX_WAITING_TASKS:
            _log.info("task left to the sensor", task_id=task_id, waiting=waiting)
            return
        tags = {
            **run_names.run_tags(task_id, label.partition_key, label.name, task_type),
            **queue_tags(task_type, place),
        }
        answer = self._send(
            LAUNCH,
            {
                "executionParams": {
                    "selector": {
                        "repositoryLocationName": run_names.CODE_LOCATION,
                        "repositoryName": run_names.REPOSITORY,
                        "jobName": run_names.JOB_NAME,
                    },
                    "runConfigData": run_names.run_config(task_type),
                    "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
                }
            },
            "launchRun",
        )
        if answer.get("__typename") != "LaunchRunSuccess":
            raise OrchestratorUnavailable(f"Dagster answers {answer.get('__typename')}.")
        with self._catalog.transaction() as session:
            tasks.record_launch(session, task_id, answer["run"]["runId"])
        _log.info("run launched", task_id=task_id, run_id=answer["run"]["runId"])

    def _send(self, query: str, variables: Mapping[str, Any], field: str) -> dict[str, Any]:
        try:
            response = self._http.post(f"{self._url}/graphql", json={"query": query, "variables": variables})
            response.raise_for_status()
            answer: dict[str, Any] = response.json()["data"][field]
        except httpx.HTTPError as error:
            raise OrchestratorUnavailable(f"Dagster does not answer ({type(error).__name__}).") from None
        except (ValueError, KeyError, TypeError):
            raise OrchestratorUnavailable("Dagster's answer is not what GraphQL would say.") from None
        return answer

    def close(self) -> None:
        """Drops the requests that are still waiting; the sensor takes over."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._http.close()
