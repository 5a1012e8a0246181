"""What a run reports when its task is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from embedd_dagster.catalog import vector_sets, vector_tables
from embedd_dagster.connectors.registry import find_model_by_name
from embedd_dagster.core.counts import ReportedCounts, RowCounts
from embedd_dagster.core.keys import render_key
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.task_run import TaskRun
from embedd_dagster.errors import EmbeddError
from embedd_dagster.protocols.store import SearchRequest

_SAMPLE_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport(ReportedCounts):
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
    cost_usd: float
    requests: int
    retries: int
    rows_per_second: float
    total_rows: int
    point_count: int
    reason: str | None = None
    """Why the task was created, if neither a user nor a schedule asked for it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The duration of each stage."""
    sample: list[dict[str, Any]] = field(default_factory=list)
    """A few live points: their ids and what they are made of. No content of rows, because reports are kept in logs."""


def report_on(run: TaskRun, counts: RowCounts, seconds: float) -> RunReport:
    """The report of a run whose task is completed; `seconds` is its duration."""
    with run.runtime.catalog.transaction() as session:
        table = vector_tables.find(session, run.table.id)
        assert table is not None  # noqa: S101 - completed in the transaction before
        live = vector_sets.get(session, table.id, table.live_version or 0)
    model = find_model_by_name(live.configuration["embedding_model"])
    requests, retries = run.context.resources.embedder_counters()
    return RunReport(
        **counts.reported(rewrites=run.task.task_type == TaskType.SYNC.value),
        vector_table_id=table.id,
        name=table.name,
        source_table=table.source_table,
        storage_name=table.storage_name,
        platform_vector_ref=table.platform_vector_ref,
        task_id=run.task.id,
        task_type=run.task.task_type,
        version=live.version,
        config_version=live.config_version,
        model=table.configuration.embedding_model,
        cost_usd=round(counts.tokens / 1_000_000 * (model.price_per_million_tokens if model else 0.0), 6),
        requests=requests + run.requests,
        retries=retries + run.retries,
        rows_per_second=round(counts.read / seconds, 1) if seconds > 0 else 0.0,
        total_rows=table.total_rows,
        point_count=table.synced_rows,
        reason=run.task.options.get("reason"),
        seconds={name: round(value, 3) for name, value in run.seconds.items()},
        sample=_sample(run, live.version) if counts.read else [],
    )


def _sample(run: TaskRun, version: int) -> list[dict[str, Any]]:
    """A few points that are near each other; none if the store does not answer, because the run is already done."""
    with run.runtime.catalog.transaction() as session:
        vector_set = run.vector_set(vector_sets.get(session, run.table.id, version))
    store = run.context.store
    try:
        first = next(iter(store.fingerprints(vector_set, 0, None)), None)
        # not looked up by its key: the numeric key NaN does not equal itself
        found = [] if first is None else list(store.vectors(vector_set, [first.key]).values())
        hits = [hit for _hash, vector in found for hit in store.search(vector_set, SearchRequest(vector, _SAMPLE_ROWS))]
    except EmbeddError as error:
        run.context.log(f"No sample: {error}")
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
