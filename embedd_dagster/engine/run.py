"""One task from its claim to its end: what a Dagster run calls, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from embedd_dagster.catalog import tasks, vector_sets, vector_tables
from embedd_dagster.core.keys import render_key
from embedd_dagster.core.models import find_model_by_name
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.backfill import backfill
from embedd_dagster.engine.pipeline import RowCounts
from embedd_dagster.engine.retry import retry_transient
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.engine.sync import sync
from embedd_dagster.engine.work import Work
from embedd_dagster.errors import EmbeddError, RunCancelled, RunSuperseded, TransientError
from embedd_dagster.protocols.store import SearchRequest

_CATALOG_PATIENCE_SECONDS = 120.0
_SAMPLE_ROWS = 3


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did to its vector table, and what is live after it."""

    vector_table_id: str
    name: str
    source_table: str
    storage_name: str
    platform_vector_ref: str | None
    task_id: str
    task_type: str
    version: int
    config_version: int
    model: str
    rows_read: int
    rows_embedded: int
    """Texts sent to the provider; a duplicate text is sent once."""
    rows_reused: int
    rows_rewritten: int
    """Rows written without an embedding, by a sync: only their metadata had changed."""
    rows_deleted: int
    rows_skipped: int
    rows_failed: int
    rows_truncated: int
    tokens: int
    cost_usd: float
    requests: int
    retries: int
    rows_per_second: float
    total_rows: int
    point_count: int
    reason: str | None = None
    """Why it was done, where nobody asked for it and no schedule."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The duration of each stage."""
    sample: list[dict[str, Any]] = field(default_factory=list)
    """A few live points: their ids and what they are made of; nothing of a row's content, as reports are kept in logs."""


def run_task(
    runtime: Runtime, task_id: str, run_id: str, *, log: Callable[[str], None], should_stop: Callable[[], bool]
) -> RunReport:
    """Claims the task for this run, does it, and ends it in the catalog; what went wrong is raised again afterwards.

    A transient error puts the task back to pending while attempts are left. Raises RunSuperseded without having changed
    anything where the task is not this run's to do; RunCancelled after the task was ended as cancelled.
    """
    try:
        with runtime.catalog.transaction() as session:
            task = tasks.claim(session, task_id, run_id)
    except RunCancelled as error:
        _end(runtime, task_id, run_id, error)
        raise
    begun = time.monotonic()
    try:
        with Work(runtime, task, run_id, log=log, should_stop=should_stop) as work:
            counts = sync(work) if task.task_type == TaskType.SYNC.value else backfill(work)
            counts_all = RowCounts()
            counts_all.add(counts)
            counts_all.add(work.caught_up)
            _complete(runtime, work)
            return _report(work, counts_all, time.monotonic() - begun)
    except RunSuperseded:
        raise
    except BaseException as error:
        log(f"The run ends: {describe(error)}")
        _end(runtime, task_id, run_id, error)
        raise


def describe(error: BaseException) -> str:
    """What may be told of an error: our own messages, of others only the type, as theirs may hold a row's content."""
    if isinstance(error, EmbeddError):
        return f"{error.message} {error.resolution}"
    return f"Internal error ({type(error).__name__}); the run's log has where it happened."


def _complete(runtime: Runtime, work: Work) -> None:
    def complete() -> None:
        with runtime.catalog.transaction() as session:
            tasks.complete(session, work.task.id, work.run_id, work.progress.to_json())

    work.patiently(complete)


def _end(runtime: Runtime, task_id: str, run_id: str, error: BaseException) -> None:
    """Ends the task badly, if it is still this run's; a catalog that is down is waited for."""

    def end() -> None:
        with runtime.catalog.transaction() as session:
            task = tasks.find(session, task_id, lock=True)
            if task is None or task.dagster_run_id != run_id or task.ended_at is not None:
                return
            # an interrupt alone is the end of a process, not a wish: Dagster sends one for a wish, which is heard
            asked_for = isinstance(error, RunCancelled) or task.cancel_requested
            if asked_for or _is_interrupt(error):
                reason = "The run was ended." if _is_interrupt(error) else describe(error)
                tasks.cancel(session, task, reason, asked_for=asked_for)
            else:
                # a bug is tried again too: it may have been the moment's; attempts are few
                permanent = isinstance(error, EmbeddError) and not isinstance(error, TransientError)
                if isinstance(error, TransientError) and not error.is_attempt:
                    tasks.hand_back(session, task, describe(error))
                    return
                told = describe(error)
                if isinstance(error, TransientError) and task.attempts >= task.max_attempts:
                    told = f"{error.message} Tried {task.attempts} times: start it again once that is mended."
                tasks.fail(session, task, told, retry=not permanent)

    retry_transient(end, patience_seconds=_CATALOG_PATIENCE_SECONDS, check=lambda: None)


def _is_interrupt(error: BaseException) -> bool:
    # Dagster's DagsterExecutionInterruptedError is a BaseException; the engine does not know Dagster
    return not isinstance(error, Exception)


def _report(work: Work, counts: RowCounts, seconds: float) -> RunReport:
    with work.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, work.table.id)
        assert table is not None  # noqa: S101 - completed in the transaction before
        live = vector_sets.get(session, table.id, table.live_version or 0)
    configuration = table.configuration
    model = find_model_by_name(live.configuration["embedding_model"])
    requests, retries = work.embedder_counters()
    is_sync = work.task.task_type == TaskType.SYNC.value
    return RunReport(
        vector_table_id=table.id,
        name=table.name,
        source_table=table.source_table,
        storage_name=table.storage_name,
        platform_vector_ref=table.platform_vector_ref,
        task_id=work.task.id,
        task_type=work.task.task_type,
        version=live.version,
        config_version=live.config_version,
        model=configuration.embedding_model,
        rows_read=counts.read,
        rows_embedded=counts.embedded,
        rows_reused=0 if is_sync else counts.reused,
        rows_rewritten=counts.reused if is_sync else 0,
        rows_deleted=counts.deleted,
        rows_skipped=counts.skipped,
        rows_failed=counts.failed,
        rows_truncated=counts.truncated,
        tokens=counts.tokens,
        cost_usd=round(counts.tokens / 1_000_000 * (model.price_per_million_tokens if model else 0.0), 6),
        requests=requests,
        retries=retries,
        rows_per_second=round(counts.read / seconds, 1) if seconds > 0 else 0.0,
        total_rows=table.total_rows,
        point_count=table.synced_rows,
        reason=work.task.options.get("reason"),
        seconds={name: round(value, 3) for name, value in work.seconds.items()},
        sample=_sample(work, live.version) if counts.read else [],
    )


def _sample(work: Work, version: int) -> list[dict[str, Any]]:
    """A few points that are near each other; none where the store does not answer: the run is done all the same."""
    with work.runtime.catalog.transaction() as session:
        vector_set = work.vector_set(vector_sets.get(session, work.table.id, version))
    try:
        first = next(iter(work.store.fingerprints(vector_set, 0, None)), None)
        # not by its key: there is a numeric one, NaN, that does not equal itself
        found = [] if first is None else list(work.store.vectors(vector_set, [first.key]).values())
        hits = [
            hit for _hash, vector in found for hit in work.store.search(vector_set, SearchRequest(vector, _SAMPLE_ROWS))
        ]
    except EmbeddError as error:
        work.log(f"No sample: {error}")
        return []
    return [
        {
            "id": render_key(hit.key),
            "similarity_score": round(hit.similarity_score, 4),
            "text_length": len(hit.embedded_text),
            "metadata": sorted(name for name, value in hit.metadata.items() if value is not None),
        }
        for hit in hits
    ]
