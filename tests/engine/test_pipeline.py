"""Rows on their way: what their text and metadata count for, and what is too much of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from embedd_dagster.core.embedded_text import MAX_METADATA_LENGTH
from embedd_dagster.core.rows import SourceRow, VectorSet
from embedd_dagster.core.vector_table import Column, ColumnRole, FilterType, VectorConfiguration
from embedd_dagster.engine.pipeline import ComposedRow, RowPipeline
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.errors import MetadataTooLarge
from tests.support.memory_embedder import MemoryEmbedder

MEBIBYTE = 2**20
COLUMNS = (
    Column("title", ColumnRole.EMBEDDING),
    Column("notes", ColumnRole.METADATA, filter_type=FilterType.KEYWORD),
    Column("tags", ColumnRole.METADATA, filter_type=FilterType.KEYWORD),
    Column("stock", ColumnRole.METADATA, filter_type=FilterType.INTEGER),
)


@pytest.fixture
def pipeline() -> RowPipeline:
    """A pipeline that only composes: it has no store."""
    return RowPipeline(
        cast("Any", SimpleNamespace()),
        VectorSet("vt_1", 1, "vt_1_t", 8, {}),
        VectorConfiguration("t", "id", COLUMNS, "m", 8),
        cast("Any", MemoryEmbedder()),
        reuse_from=[],
        memory=TextMemory(),
    )


def rows(count: int, *, title: str = "t", notes: object = None, tags: object = None) -> list[SourceRow]:
    return [SourceRow(key, (title, notes, tags, 7), key, key) for key in range(count)]


def batched(pipeline: RowPipeline, given: Sequence[SourceRow]) -> list[list[ComposedRow]]:
    return list(pipeline.batches([list(given)]))


def test_ordinary_rows_fill_a_batch(pipeline: RowPipeline) -> None:
    assert [len(batch) for batch in batched(pipeline, rows(600, notes="red", tags=["a", "b"]))] == [256, 256, 88]


@pytest.mark.parametrize(
    "values", [{"notes": "x" * MEBIBYTE}, {"notes": "x" * (MEBIBYTE // 2), "tags": ["y" * (MEBIBYTE // 2)]}]
)
def test_a_batch_is_bounded_by_its_metadata(pipeline: RowPipeline, values: dict[str, object]) -> None:
    batches = batched(pipeline, rows(20, **values))
    assert sum(map(len, batches)) == 20
    for batch in batches:
        assert sum(row.metadata_length for row in batch) * 2 <= pipeline.limits.max_bytes
    assert len(batches) <= 7


def test_metadata_that_is_just_small_enough_is_kept(pipeline: RowPipeline) -> None:
    row = pipeline.compose(rows(1, notes="x" * (MAX_METADATA_LENGTH - 3), tags="abc")[0])
    assert row.failure is None
    assert row.metadata_length == MAX_METADATA_LENGTH
    assert row.metadata["stock"] == 7


def test_too_much_metadata_fails_its_row_and_is_let_go(pipeline: RowPipeline) -> None:
    row = pipeline.compose(rows(1, notes="canary " + "x" * (MAX_METADATA_LENGTH - 7), tags="y")[0])
    assert isinstance(row.failure, MetadataTooLarge)
    assert row.failure.code == "metadata_too_large"
    assert "canary" not in row.failure.message
    assert "shorten it in the source" in row.failure.message
    assert (row.text, dict(row.metadata)) == ("", {}), "it does not wait in a queue"


def test_a_row_without_text_may_have_any_metadata(pipeline: RowPipeline) -> None:
    assert pipeline.compose(rows(1, title=" ", notes="x" * (2 * MAX_METADATA_LENGTH))[0]).failure is None
