"""Dagster's backfills: several vector tables that somebody materializes together in the UI.

Dagster gives a whole backfill up when one of its partitions is gone, or never was there: it cancels all its runs, and
launches no more. What nobody cancelled is still to be done; here is found out what that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import dagster as dg
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill

from embedd_dagster.core.run_names import ASSET_NAME, JOB_NAME, PARTITION_TAG
from embedd_dagster.defs.stopping import GIVEN_UP_BACKFILL
from embedd_dagster.defs.tags import BACKFILL_TAG, CANCELLED_BY_TAG, MODE_TAG

ASSET_KEY: Final = dg.AssetKey(ASSET_NAME)
_UNFINISHED: Final = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]
_LOOK_BACK: Final = timedelta(days=1)
_OPTIONS: Final = ("full", "retry_failed", "confirm_mass_delete")


@dataclass(frozen=True, slots=True)
class GivenUpWork:
    """A partition of a backfill that Dagster gave up before a run had begun it."""

    backfill_id: str
    partition_key: str
    """What was asked for; there may be no such partition."""
    requested_at: datetime
    is_sync: bool
    options: Mapping[str, bool] = field(default_factory=dict)
    vector_table_id: str = ""
    """Empty as long as the catalog has not been asked which vector table has the partition."""


@dataclass(frozen=True, slots=True)
class Backfills:
    """What the backfills mean for this tick."""

    targeted_keys: frozenset[str] = frozenset()
    """Partitions of backfills that go on. Deleting one of them would end its whole backfill."""
    given_up: tuple[GivenUpWork, ...] = ()
    cancelled_runs: tuple[str, ...] = ()
    """Runs that somebody cancelled, one by one, while their backfill went on."""
    finished_ids: frozenset[str] = frozenset()
    """Given up, with every run at its end: once nothing of them is left to do, nothing ever will be."""


def read_backfills(instance: dg.DagsterInstance, done: Iterable[str] = ()) -> Backfills:
    """The backfills of vector tables that go on, or were given up within a day and are not among those done with."""
    targeted: set[str] = set()
    given_up: list[GivenUpWork] = []
    cancelled: list[str] = []
    finished: set[str] = set()
    done = set(done)
    for backfill in _backfills(instance):
        keys = target_keys(backfill)
        if backfill.status is not BulkActionStatus.FAILED:
            targeted |= keys
        if backfill.backfill_id in done:
            continue
        if backfill.status is BulkActionStatus.REQUESTED:
            cancelled += _cancelled_alone(instance, backfill.backfill_id)
        elif backfill.status in GIVEN_UP_BACKFILL:
            runs = instance.get_runs(dg.RunsFilter(tags={BACKFILL_TAG: backfill.backfill_id}))
            begun = {run.tags.get(PARTITION_TAG) for run in runs if not _was_cancelled_with_its_backfill(run)}
            given_up += [_work(backfill, key) for key in sorted(keys - begun)]
            if backfill.status is BulkActionStatus.FAILED and all(run.is_finished for run in runs):
                finished.add(backfill.backfill_id)
    return Backfills(frozenset(targeted), tuple(given_up), tuple(cancelled), frozenset(finished))


def _backfills(instance: dg.DagsterInstance) -> list[PartitionBackfill]:
    unfinished = instance.get_backfills(filters=BulkActionsFilter(statuses=_UNFINISHED))
    since = datetime.now(UTC) - _LOOK_BACK
    failed = instance.get_backfills(filters=BulkActionsFilter(statuses=[BulkActionStatus.FAILED], created_after=since))
    return [backfill for backfill in (*unfinished, *failed) if is_ours(backfill)]


def is_ours(backfill: PartitionBackfill) -> bool:
    """Whether vector tables are among what it materializes."""
    return backfill.job_name == JOB_NAME or ASSET_KEY in (backfill.asset_selection or ())


def target_keys(backfill: PartitionBackfill) -> frozenset[str]:
    """The partitions of the asset that it is to materialize, including keys that do not exist."""
    if backfill.asset_backfill_data is None:
        return frozenset(backfill.partition_names or ())
    target = backfill.asset_backfill_data.target_subset
    if ASSET_KEY not in target.partitions_subsets_by_asset_key:
        return frozenset()
    return frozenset(target.partitions_subsets_by_asset_key[ASSET_KEY].get_partition_keys())


def _cancelled_alone(instance: dg.DagsterInstance, backfill_id: str) -> list[str]:
    ended = dg.RunsFilter(tags={BACKFILL_TAG: backfill_id}, statuses=[dg.DagsterRunStatus.CANCELED])
    found = [run.run_id for run in instance.get_runs(ended) if _was_cancelled_with_its_backfill(run)]
    if not found:
        return []
    # it was given up maybe between the two reads: only while it goes on, Dagster itself has cancelled none of its runs
    again = instance.get_backfill(backfill_id)
    return found if again is not None and again.status is BulkActionStatus.REQUESTED else []


def _was_cancelled_with_its_backfill(run: dg.DagsterRun) -> bool:
    return run.status is dg.DagsterRunStatus.CANCELED and CANCELLED_BY_TAG not in run.tags


def _work(backfill: PartitionBackfill, partition_key: str) -> GivenUpWork:
    config = _asset_config(backfill.run_config)
    mode = backfill.tags.get(MODE_TAG) or config.get("mode")
    return GivenUpWork(
        backfill_id=backfill.backfill_id,
        partition_key=partition_key,
        requested_at=datetime.fromtimestamp(backfill.backfill_timestamp, UTC),
        is_sync=mode == "sync",
        options={name: True for name in _OPTIONS if config.get(name) is True},
    )


def _asset_config(run_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    part: Any = run_config or {}
    for name in ("ops", "vector_table", "config"):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}
