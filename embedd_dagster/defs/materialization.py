"""What a materialization tells: numbers that Dagster plots over time, where to look further, and a few rows."""

from __future__ import annotations

import json
from typing import Final

import dagster as dg

from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.run import RunReport

_COUNTS: Final = (
    "rows_read",
    "rows_embedded",
    "rows_reused",
    "rows_rewritten",
    "rows_deleted",
    "rows_skipped",
    "rows_failed",
    "rows_truncated",
    "tokens",
    "requests",
    "retries",
    "point_count",
    "config_version",
)


def describe_report(report: RunReport, api_url: str | None) -> dict[str, dg.MetadataValue]:
    """The metadata of a materialization."""
    metadata: dict[str, dg.MetadataValue] = {
        "dagster/row_count": dg.MetadataValue.int(report.total_rows),
        **{name: dg.MetadataValue.int(getattr(report, name)) for name in _COUNTS},
        "cost_usd": dg.MetadataValue.float(float(report.cost_usd)),
        "rows_per_second": dg.MetadataValue.float(float(report.rows_per_second)),
        **{f"seconds/{stage}": dg.MetadataValue.float(float(spent)) for stage, spent in report.seconds.items()},
        "task_type": dg.MetadataValue.text(report.task_type),
        "task_id": dg.MetadataValue.text(report.task_id),
        "embedding_model": dg.MetadataValue.text(report.model),
        "version": dg.MetadataValue.int(report.version),
    }
    if api_url is not None:
        base = f"{api_url.rstrip('/')}/v1"
        metadata["vector_table"] = dg.MetadataValue.url(f"{base}/vector-tables/{report.vector_table_id}")
        metadata["task"] = dg.MetadataValue.url(f"{base}/tasks/{report.task_id}")
    if report.sample:
        metadata["sample"] = dg.MetadataValue.json(json.loads(json.dumps(report.sample, default=str)))
    return metadata


def data_version(report: RunReport, before: str | None) -> dg.DataVersion:
    """`<version of the set>`, behind it the sync that changed it last; as before where a sync changed nothing."""
    if report.task_type != TaskType.SYNC.value:
        return dg.DataVersion(f"v{report.version}")
    changed = report.rows_embedded or report.rows_rewritten or report.rows_deleted
    if not changed and before is not None:
        return dg.DataVersion(before)
    return dg.DataVersion(f"v{report.version}+{report.task_id}")
