"""Reports of a CDC consumer: sums, at most one per minute and vector table."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from embedd_dagster.core.counts import RowCounts
from embedd_dagster.engine.cdc import report as cdc_report
from embedd_dagster.engine.cdc.report import CdcReport, CdcReports
from embedd_dagster.errors import RunSuperseded, VectorStoreRejected, VectorStoreUnavailable


class _Table:
    version = 3
    row = SimpleNamespace(
        partition_key="vt_a_products",
        name="products",
        source_table="public.products",
        storage_name="vt_a_products",
        platform_vector_ref=None,
        embedding_model="m",
    )

    def count_points(self) -> int:
        return 40


class _Lease:
    lag_bytes = 77

    @contextmanager
    def fenced(self) -> Any:
        yield None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    instant = [1000.0]
    monkeypatch.setattr(cdc_report.failed_rows, "count", lambda *_args: 0)
    monkeypatch.setattr(cdc_report.vector_tables, "record_counts", lambda *_args: None)
    return instant


def test_changes_are_summed_and_reported_once_per_minute(clock: list[float]) -> None:
    sent: list[CdcReport] = []
    reports = CdcReports(sent.append, lambda: clock[0])
    tables: Any = {"vt_a": _Table()}
    lease: Any = _Lease()
    reports.add("vt_a", RowCounts(read=1, embedded=1), 1, 0.1)
    reports.send_due(tables, lease)
    assert [report.changes for report in sent] == [1]
    for lag in (0.2, 0.9, 0.3):
        reports.add("vt_a", RowCounts(read=2, reused=2), 2, lag)
        clock[0] += 10
        reports.send_due(tables, lease)
    assert len(sent) == 1
    clock[0] += 31
    reports.send_due(tables, lease)
    assert (sent[1].changes, sent[1].rows_rewritten, sent[1].lag_seconds) == (6, 6, 0.9)
    assert (sent[1].version, sent[1].point_count, sent[1].lag_bytes) == (3, 40, 77)
    assert (sent[1].partition_key, sent[1].source_table) == ("vt_a_products", "public.products")
    clock[0] += 61
    reports.send_due(tables, lease)
    assert len(sent) == 2, "nothing happened, so there is nothing to report"


def test_remaining_sums_are_reported_at_the_end(clock: list[float]) -> None:
    sent: list[CdcReport] = []
    reports = CdcReports(sent.append, lambda: clock[0])
    tables: Any = {"vt_a": _Table()}
    lease: Any = _Lease()
    for _ in range(2):
        reports.add("vt_a", RowCounts(read=1), 1, None)
        reports.send_due(tables, lease, everything=True)
    assert len(sent) == 2
    reports.add("vt_gone", RowCounts(read=1), 1, None)
    reports.send_due(tables, lease, everything=True)
    assert len(sent) == 2


@pytest.mark.parametrize("error", [VectorStoreUnavailable("down"), VectorStoreRejected("It is gone.")])
def test_a_report_is_delayed_while_the_store_cannot_be_counted(clock: list[float], error: Exception) -> None:
    sent: list[CdcReport] = []
    reports, table = CdcReports(sent.append, lambda: clock[0]), _Table()
    tables: Any = {"vt_a": table}
    lease: Any = _Lease()
    attempts: list[Exception] = []

    def down() -> int:
        attempts.append(error)
        raise error

    table.count_points = down  # type: ignore[method-assign]
    reports.add("vt_a", RowCounts(read=1), 1, 0.1)
    for _ in range(3):
        reports.send_due(tables, lease)
    assert len(attempts) == 1, "it is not asked again for a minute"
    reports.add("vt_a", RowCounts(read=2), 2, 0.2)
    tables["vt_a"] = _Table()
    clock[0] += 61
    reports.send_due(tables, lease)
    assert [(report.changes, report.rows_read) for report in sent] == [(3, 3)]


def test_a_run_that_lost_its_lease_learns_of_it_when_it_reports(clock: list[float]) -> None:
    reports, table = CdcReports(lambda _report: None, lambda: clock[0]), _Table()

    def superseded() -> int:
        raise RunSuperseded("Another run follows.")

    table.count_points = superseded  # type: ignore[method-assign]
    tables: Any = {"vt_a": table}
    lease: Any = _Lease()
    reports.add("vt_a", RowCounts(read=1), 1, 0.1)
    with pytest.raises(RunSuperseded):
        reports.send_due(tables, lease)
