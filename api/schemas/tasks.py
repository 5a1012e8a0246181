"""Tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from embedd_dagster.catalog import tasks
from embedd_dagster.catalog.tables import Task

from ..pagination import ListAnswer
from ..schemas.base import Answer, Timestamp

TaskStatusName = Literal["pending", "running", "completed", "failed", "cancelled"]


class TaskProgress(Answer):
    """The progress of a task."""

    rows_processed: int
    total_rows: int
    rows_failed: int
    rows_skipped: int = Field(description="Rows without text in the embedding columns, which get no vector")
    rows_truncated: int = Field(description="Rows whose text was cut at the model's limit")
    tokens: int
    last_processed_pk: int | float | str | None
    stage: str | None = Field(
        description="What the task is doing. `queued`: it waits for a run; `starting`; a backfill: `prepare`, `load`, "
        "`catch_up`, `index`, `verify`, `swap`; a sync: `digest`, `sync`. A task that failed or was cancelled shows the stage "
        "in which it ended; a completed one shows null",
        examples=["load"],
    )
    rows_indexed: int | None = Field(
        description="In stage `index`: vectors that the store has indexed so far, if it reports them; otherwise null"
    )


class TaskAnswer(Answer):
    """A backfill or sync of a vector table, and its progress."""

    id: str = Field(examples=["task_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str
    task_type: Literal["backfill", "rebackfill", "sync"]
    target_id: str = Field(description="The vector table", examples=["vt_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    status: TaskStatusName = Field(description="At most one task per vector table is `pending` or `running`")
    progress: TaskProgress
    attempts: int = Field(description="Runs that have worked on it so far")
    max_attempts: int
    last_error: str | None
    dagster_run_id: str | None = Field(description="The Dagster run that works on it")
    created_at: Timestamp
    started_at: Timestamp | None
    ended_at: Timestamp | None

    @classmethod
    def of(cls, task: Task) -> TaskAnswer:
        """The response for a task."""
        progress = {name: task.progress.get(name, 0) for name in TaskProgress.model_fields}
        progress["last_processed_pk"] = task.progress.get("last_processed_pk")
        progress["stage"] = tasks.shown_stage(task)
        progress["rows_indexed"] = task.progress.get("rows_indexed") if progress["stage"] == "index" else None
        return cls(
            id=task.id,
            org_id=task.org_id,
            task_type=task.task_type,
            target_id=task.target_id,
            status=task.status,
            progress=TaskProgress(**progress),
            attempts=task.attempts,
            max_attempts=task.max_attempts,
            last_error=task.last_error,
            dagster_run_id=task.dagster_run_id,
            created_at=task.created_at,
            started_at=task.started_at,
            ended_at=task.ended_at,
        )


class TaskList(ListAnswer[TaskAnswer]):
    """A page of tasks."""
