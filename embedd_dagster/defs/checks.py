"""What is asserted of a vector table after each materialization; the check that must block a swap is the engine's."""

import warnings
from collections.abc import Iterator

import dagster as dg

from embedd_dagster.defs.assets import vector_table
from embedd_dagster.defs.failures import as_failure
from embedd_dagster.defs.heartbeat import heartbeat
from embedd_dagster.defs.partitions import vector_tables
from embedd_dagster.defs.resources import RuntimeResource
from embedd_dagster.engine.inspect import LiveSetInspection, inspect_live_set

_DESCRIPTIONS = {
    "point_count_matches_source": "Every row of the source has a point, but for rows without text and failed rows.",
    "vectors_have_configured_dimensions": "A sample of the vectors has the dimensions that were configured.",
    "sampled_row_hashes_agree": "A sample of the points was made from the rows as they are now in the source.",
    "no_failed_rows": "No row was refused by the provider or the store.",
}


def _specs() -> list[dg.AssetCheckSpec]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # of partitioned checks; Dagster's version is pinned
        return [
            dg.AssetCheckSpec(name, asset=vector_table, description=description, partitions_def=vector_tables)
            for name, description in _DESCRIPTIONS.items()
        ]


# one step for all of them: the two sides are looked at once
@dg.multi_asset_check(name="vector_table_checks", specs=_specs())
def vector_table_checks(
    context: dg.AssetCheckExecutionContext, runtime: RuntimeResource
) -> Iterator[dg.AssetCheckResult]:
    """Four verdicts on what is live. What could not be looked at is a warning: the run has done its work."""
    try:
        opened = runtime.open()
        with heartbeat(opened, context.run.run_id, context.log.info):
            inspection = inspect_live_set(opened, context.partition_key)
    except Exception as error:  # noqa: BLE001 - whatever it is, the table is materialized and its task completed
        failure = as_failure(error)
        for name in _DESCRIPTIONS:
            yield dg.AssetCheckResult(
                check_name=name,
                asset_key=vector_table.key,
                passed=False,
                severity=dg.AssetCheckSeverity.WARN,
                description=f"It could not be looked at: {failure.description}",
            )
        return
    yield from judge(inspection)


def judge(inspection: LiveSetInspection) -> Iterator[dg.AssetCheckResult]:
    """The verdicts. What a writer at the source can cause between run and check is a warning, a wrong vector an error."""
    expected = inspection.source_rows - inspection.skipped_count - inspection.failed_count
    warn, error = dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR

    def verdict(name: str, *, passed: bool, severity: dg.AssetCheckSeverity, **numbers: int) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            check_name=name,
            asset_key=vector_table.key,
            passed=passed,
            severity=severity,
            metadata={key: dg.MetadataValue.int(number) for key, number in numbers.items()},
        )

    yield verdict(
        "point_count_matches_source",
        passed=inspection.point_count == expected,
        severity=warn,
        source_rows=inspection.source_rows,
        point_count=inspection.point_count,
        skipped_rows=inspection.skipped_count,
        failed_rows=inspection.failed_count,
    )
    yield verdict(
        "vectors_have_configured_dimensions",
        passed=inspection.dimensions_wrong == 0,
        severity=error,
        sampled=inspection.sampled,
        dimensions_wrong=inspection.dimensions_wrong,
    )
    yield verdict(
        "sampled_row_hashes_agree",
        passed=inspection.hash_mismatches == 0,
        severity=warn,
        sampled=inspection.sampled,
        hash_mismatches=inspection.hash_mismatches,
    )
    yield verdict(
        "no_failed_rows", passed=inspection.failed_count == 0, severity=warn, failed_rows=inspection.failed_count
    )
