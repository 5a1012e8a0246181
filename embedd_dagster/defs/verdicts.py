"""What is said of a vector table's live vectors after each run: one verdict, with what was found and counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import dagster as dg

from embedd_dagster.defs.backfills import ASSET_KEY
from embedd_dagster.engine.inspect import LiveSetInspection

CHECK_NAME: Final = "vectors_match_source"
FORMER_CHECK_NAMES: Final = (
    "point_count_matches_source",
    "vectors_have_configured_dimensions",
    "sampled_row_hashes_agree",
    "no_failed_rows",
)
"""Checks of earlier versions: their results are forgotten with the runs that made them."""


def judge(inspection: LiveSetInspection) -> dg.AssetCheckResult:
    """The verdict. What a writer at the source can cause between run and check is a warning, a wrong vector an error."""
    findings = list(_findings(inspection))
    numbers = {
        "source_rows": inspection.source_rows,
        "point_count": inspection.point_count,
        "skipped_rows": inspection.skipped_count,
        "failed_rows": inspection.failed_count,
        "sampled": inspection.sampled,
        "dimensions_wrong": inspection.dimensions_wrong,
        "hash_mismatches": inspection.hash_mismatches,
    }
    return dg.AssetCheckResult(
        check_name=CHECK_NAME,
        asset_key=ASSET_KEY,
        passed=not findings,
        severity=dg.AssetCheckSeverity.ERROR if inspection.dimensions_wrong else dg.AssetCheckSeverity.WARN,
        description=" ".join(findings) or "Every row with a text has a point, and a sample of the points is right.",
        metadata={key: dg.MetadataValue.int(number) for key, number in numbers.items()},
    )


def _findings(inspection: LiveSetInspection) -> Iterator[str]:
    if inspection.failed_count:
        yield f"{inspection.failed_count} rows were refused by the provider or the store."
    expected = inspection.source_rows - inspection.skipped_count - inspection.failed_count
    if inspection.point_count != expected:
        yield f"There are {inspection.point_count} points for {expected} rows: the next sync adds or removes the difference."
    if inspection.dimensions_wrong:
        yield f"{inspection.dimensions_wrong} of {inspection.sampled} sampled vectors have other dimensions than configured."
    if inspection.hash_mismatches:
        yield (
            f"{inspection.hash_mismatches} of {inspection.sampled} sampled points were made from rows that have changed "
            "since: the next sync replaces them."
        )


def not_looked_at(failure: dg.Failure) -> dg.AssetCheckResult:
    """The verdict on vectors that could not be looked at: a warning, as the run has done its work."""
    return dg.AssetCheckResult(
        check_name=CHECK_NAME,
        asset_key=ASSET_KEY,
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"The vectors could not be looked at: {failure.description}",
    )


def not_checked(partition_key: str, failure: dg.Failure) -> dg.AssetCheckEvaluation:
    """The verdict of a run that fails before its check, for this vector table alone.

    Dagster plans the check when the run is launched, and would show a check that is never reached as failed to execute.
    """
    return dg.AssetCheckEvaluation(
        asset_key=ASSET_KEY,
        check_name=CHECK_NAME,
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"The run failed, so the vectors were not looked at; what was live stays live. {failure.description}",
        metadata={},
        partition=partition_key,
    )
