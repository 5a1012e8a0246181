"""What a materialization says: what it is, where to look further, numbers that Dagster plots, and a few rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import dagster as dg

from embedd_dagster.connectors import registry
from embedd_dagster.core.counts import REPORTED_COUNTS
from embedd_dagster.core.status import TaskType
from embedd_dagster.engine.cdc.report import CdcReport
from embedd_dagster.engine.report import RunReport
from embedd_dagster.settings import Settings

_COUNTS: Final = (*REPORTED_COUNTS, "requests", "retries", "point_count", "config_version")


@dataclass(frozen=True, slots=True)
class Links:
    """Where people find what a materialization is about; without `api_url` there are no links to the API."""

    api_url: str | None
    stored: Callable[[str], str | None]
    """Where the managed store shows the vectors of a storage name."""

    @classmethod
    def of(cls, settings: Settings) -> Links:
        """Those of this installation."""
        return cls(settings.api_url, partial(registry.managed_store_spec(settings.managed_store).url_of, settings))


def describe_report(report: RunReport, links: Links) -> dict[str, dg.MetadataValue]:
    """The metadata of a materialization; Dagster shows it in this order."""
    metadata: dict[str, dg.MetadataValue] = _subject(report, links)
    if links.api_url is not None:
        metadata["task"] = dg.MetadataValue.url(f"{links.api_url.rstrip('/')}/v1/tasks/{report.task_id}")
    metadata["task_type"] = dg.MetadataValue.text(report.task_type)
    if report.reason:
        metadata["reason"] = dg.MetadataValue.text(report.reason)
    metadata |= {
        "dagster/row_count": dg.MetadataValue.int(report.total_rows),
        **{name: dg.MetadataValue.int(getattr(report, name)) for name in _COUNTS},
        "cost_usd": dg.MetadataValue.float(float(report.cost_usd)),
        "rows_per_second": dg.MetadataValue.float(float(report.rows_per_second)),
        **{f"seconds/{stage}": dg.MetadataValue.float(float(spent)) for stage, spent in report.seconds.items()},
        "task_id": dg.MetadataValue.text(report.task_id),
        "version": dg.MetadataValue.int(report.version),
    }
    if report.sample:
        metadata["sample"] = dg.MetadataValue.json(json.loads(json.dumps(report.sample, default=str)))
    return metadata


def describe_follow_report(report: CdcReport, links: Links) -> dict[str, dg.MetadataValue]:
    """The metadata of a materialization that a consumer writes: under the names of a sync's, where they mean the same."""
    names = ("changes", *REPORTED_COUNTS, "point_count", "version")
    numbers = {name: getattr(report, name) for name in names if name != "rows_reused"}
    metadata = _subject(report, links)
    metadata["task_type"] = dg.MetadataValue.text("follow")
    metadata |= {name: dg.MetadataValue.int(value) for name, value in numbers.items()}
    metadata["lag_seconds"] = dg.MetadataValue.float(round(report.lag_seconds, 3))
    metadata["seconds/follow"] = dg.MetadataValue.float(round(report.seconds, 3))
    if report.lag_bytes is not None:
        metadata["lag_bytes"] = dg.MetadataValue.int(report.lag_bytes)
    return metadata


def _subject(report: RunReport | CdcReport, links: Links) -> dict[str, dg.MetadataValue]:
    """What was materialized, from what, and where to look at it."""
    metadata: dict[str, dg.MetadataValue] = {
        "name": dg.MetadataValue.text(report.name),
        "source_table": dg.MetadataValue.text(report.source_table),
        "embedding_model": dg.MetadataValue.text(report.model),
    }
    if links.api_url is not None:
        url = f"{links.api_url.rstrip('/')}/v1/vector-tables/{report.vector_table_id}"
        metadata["vector_table"] = dg.MetadataValue.url(url)
    if report.platform_vector_ref is not None:
        metadata["vectors"] = dg.MetadataValue.text(f"{report.platform_vector_ref} in the source's database")
    elif stored_at := links.stored(report.storage_name):
        metadata["vectors"] = dg.MetadataValue.url(stored_at)
    else:
        metadata["vectors"] = dg.MetadataValue.text(report.storage_name)
    return metadata


def data_version(report: RunReport, before: str | None) -> dg.DataVersion:
    """`<version of the set>`, behind it the sync that changed it last; as before where a sync changed nothing."""
    if report.task_type != TaskType.SYNC.value:
        return dg.DataVersion(f"v{report.version}")
    changed = report.rows_embedded or report.rows_rewritten or report.rows_deleted
    if not changed and before is not None:
        return dg.DataVersion(before)
    return dg.DataVersion(f"v{report.version}+{report.task_id}")
