"""What becomes of rows, counted: the one definition of the counts that runs, reports and progress show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from embedd_dagster.core.keys import Key, render_key


@dataclass(slots=True)
class RowCounts:
    """What became of rows; every row read is one of embedded, reused, skipped or failed."""

    read: int = 0
    embedded: int = 0
    """Texts sent to the provider."""
    reused: int = 0
    """Rows whose vector was already there, or is a duplicate's."""
    skipped: int = 0
    """Rows without any text: they have no point."""
    failed: int = 0
    truncated: int = 0
    """Rows whose text was cut at the model's limit."""
    deleted: int = 0
    tokens: int = 0

    def add(self, other: RowCounts) -> None:
        """Adds the other's counts to these."""
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def reported(self, *, rewrites: bool) -> dict[str, int]:
        """The counts under the names of `ReportedCounts`.

        With `rewrites` (a sync, CDC) a reused vector means a row that was written again for its metadata.
        """
        counts = {name if name == "tokens" else f"rows_{name}": value for name, value in self.to_json().items()}
        reused = counts.pop("rows_reused")
        return counts | {"rows_reused": 0 if rewrites else reused, "rows_rewritten": reused if rewrites else 0}


_NAMES: Final = tuple(item.name for item in fields(RowCounts))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCounts:
    """The counts of a report, under the names that Dagster shows and plots."""

    rows_read: int
    rows_embedded: int
    """Texts sent to the provider; a duplicate text is sent once."""
    rows_reused: int
    rows_rewritten: int
    """Rows that a sync wrote without an embedding: only their metadata had changed."""
    rows_deleted: int
    rows_skipped: int
    rows_failed: int
    rows_truncated: int
    tokens: int


REPORTED_COUNTS: Final = tuple(item.name for item in fields(ReportedCounts))


def progress_to_json(
    counts: RowCounts,
    *,
    total_rows: int = 0,
    last_key: Key | None = None,
    stage: str | None = None,
    rows_indexed: int | None = None,
) -> Mapping[str, Any]:
    """A task's `progress` as the catalog and the API show it. `total_rows` is at least the number of rows read."""
    return {
        "rows_processed": counts.read,
        "total_rows": max(total_rows, counts.read),
        "rows_failed": counts.failed,
        "rows_skipped": counts.skipped,
        "rows_truncated": counts.truncated,
        "tokens": counts.tokens,
        "last_processed_pk": None if last_key is None else render_key(last_key),
        "stage": stage,
        "rows_indexed": rows_indexed,
    }
