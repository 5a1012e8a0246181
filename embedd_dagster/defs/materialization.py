"""What a materialization tells: numbers that Dagster plots over time, where to look further, and a few rows."""

from __future__ import annotations

import json
from typing import Final

import dagster as dg

from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.follow_reports import FollowReport
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
        "name": dg.MetadataValue.text(report.name),
        "source_table": dg.MetadataValue.text(report.source_table),
        "task_type": dg.MetadataValue.text(report.task_type),
        "task_id": dg.MetadataValue.text(report.task_id),
        "embedding_model": dg.MetadataValue.text(report.model),
        "version": dg.MetadataValue.int(report.version),
    }
    if report.reason:
        metadata["reason"] = dg.MetadataValue.text(report.reason)
    if api_url is not None:
        metadata["vector_table"] = _vector_table(api_url, report.vector_table_id)
        metadata["task"] = dg.MetadataValue.url(f"{api_url.rstrip('/')}/v1/tasks/{report.task_id}")
    if report.sample:
        metadata["sample"] = dg.MetadataValue.json(json.loads(json.dumps(report.sample, default=str)))
    return metadata


def describe_follow_report(report: FollowReport, api_url: str | None) -> dict[str, dg.MetadataValue]:
    """The metadata of a materialization that a follower writes: under the names of a sync's, where they mean the same."""
    counts = report.counts
    numbers = {
        "changes": report.changes,
        "rows_read": counts.read,
        "rows_embedded": counts.embedded,
        "rows_rewritten": counts.reused,
        "rows_deleted": counts.deleted,
        "rows_skipped": counts.skipped,
        "rows_failed": counts.failed,
        "rows_truncated": counts.truncated,
        "tokens": counts.tokens,
        "point_count": report.point_count,
        "version": report.version,
    }
    metadata: dict[str, dg.MetadataValue] = {name: dg.MetadataValue.int(value) for name, value in numbers.items()}
    metadata["task_type"] = dg.MetadataValue.text("follow")
    metadata["lag_seconds"] = dg.MetadataValue.float(round(report.lag_seconds, 3))
    metadata["seconds/follow"] = dg.MetadataValue.float(round(report.seconds, 3))
    if report.lag_bytes is not None:
        metadata["lag_bytes"] = dg.MetadataValue.int(report.lag_bytes)
    if api_url is not None:
        metadata["vector_table"] = _vector_table(api_url, report.vector_table_id)
    return metadata


def _vector_table(api_url: str, vector_table_id: str) -> dg.UrlMetadataValue:
    return dg.MetadataValue.url(f"{api_url.rstrip('/')}/v1/vector-tables/{vector_table_id}")


def data_version(report: RunReport, before: str | None) -> dg.DataVersion:
    """`<version of the set>`, behind it the sync that changed it last; as before where a sync changed nothing."""
    if report.task_type != TaskType.SYNC.value:
        return dg.DataVersion(f"v{report.version}")
    changed = report.rows_embedded or report.rows_rewritten or report.rows_deleted
    if not changed and before is not None:
        return dg.DataVersion(before)
    return dg.DataVersion(f"v{report.version}+{report.task_id}")
