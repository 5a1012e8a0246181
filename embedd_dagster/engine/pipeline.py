"""Rows → points of one vector set: compose → reuse or embed → upsert, with several batches in flight.

A batch is processed whole by one worker thread; batches of a shard end in the order in which they were read, so that a
checkpoint may follow each. What is in flight is bounded by bytes, not by rows. Processing a batch twice ends in the
same points: that, and the checkpoint behind the write, is what makes a killed run resumable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from embedd_dagster.catalog.vector_sets import RowFailure
from embedd_dagster.core.embedded_text import compose_text, metadata_value, text_hash
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import PointBatch, SourceRow, Vectors, VectorSet
from embedd_dagster.core.shards import BatchLimits, pack_batches
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.embedders.pacing import PacedEmbedder
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.errors import RowError, TextRejected
from embedd_dagster.stores.base import Store


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
        for name in COUNT_NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in COUNT_NAMES}


COUNT_NAMES = tuple(item.name for item in fields(RowCounts))


class ComposedRow(NamedTuple):
    """A row with its text; `text` is "" for a row that has nothing to embed, or that `failure` says why not."""

    row: SourceRow
    text: str
    tokens: int
    truncated: bool
    metadata: dict[str, object]
    failure: RowError | None = None

    @property
    def size_bytes(self) -> int:
        """About what the row holds in memory."""
        return 200 + 2 * len(self.text)


@dataclass(slots=True)
class BatchOutcome:
    """What became of one batch."""

    last_key: Key
    counts: RowCounts
    failures: list[RowFailure] = field(default_factory=list)
    without_point: list[Key] = field(default_factory=list)
    """Keys of skipped and failed rows: a point that an earlier version of the row left must go."""
    written: list[Key] = field(default_factory=list)


class RowPipeline:
    """Turns rows into points of one vector set. Safe to use from several threads."""

    def __init__(
        self,
        *,
        vector_set: VectorSet,
        configuration: VectorConfiguration,
        store: Store,
        embedder: PacedEmbedder,
        reuse_from: Sequence[VectorSet],
        memory: TextMemory,
        patiently: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self.configuration = configuration
        self.concurrency = embedder.limits.concurrency
        """How many batches the provider takes at once."""
        self._patiently = patiently
        self._set = vector_set
        self._store = store
        self._embedder = embedder
        self._reuse_from = tuple(reuse_from)
        self._memory = memory
        positions = {name: index for index, name in enumerate(configuration.column_names)}
        self._text_columns = configuration.embedding_columns
        self._text_count = len(self._text_columns)
        text_positions = [positions[column.name] for column in self._text_columns]
        # embedding columns come first in a selection, so that nearly always a slice is enough
        self._text_positions = None if text_positions == list(range(self._text_count)) else text_positions
        self._metadata = [(name, positions[name], kind) for name, kind in configuration.filter_types.items()]

    @property
    def limits(self) -> BatchLimits:
        """How large a batch may be."""
        return self._embedder.limits.batch

    def batches(self, pages: Iterable[list[SourceRow]]) -> Iterator[list[ComposedRow]]:
        """The rows of the pages, composed, in batches that one request to the provider can take. Lazy."""
        composed = (self.compose(row) for page in pages for row in page)
        return pack_batches(((row, row.tokens, row.size_bytes) for row in composed), self.limits)

    def compose(self, row: SourceRow) -> ComposedRow:
        """The row with its text, cut at the model's limit, and its metadata."""
        values = row.values
        if self._text_positions is None:
            texts = values[: self._text_count]
        else:
            texts = tuple(values[position] for position in self._text_positions)
        text = compose_text(self._text_columns, texts)
        # the values are let go: a text of a megabyte, of which a model reads the beginning, must not wait in a queue
        row = SourceRow(row.key, (), row.row_hash, row.bucket)
        if not text:
            return ComposedRow(row, "", 0, False, {})
        try:
            metadata: dict[str, object] = {}
            for name, position, kind in self._metadata:
                value = metadata_value(values[position], kind)
                if value is not None:
                    metadata[name] = value
        except RowError as error:
            return ComposedRow(row, "", 0, False, {}, error)
        cut = self._embedder.cut(text)
        return ComposedRow(row, cut.text, cut.tokens, cut.truncated, metadata)

    def process(self, batch: list[ComposedRow]) -> BatchOutcome:
        """Embeds and writes one batch; when it returns, every point of it is durable. Idempotent."""
        outcome = BatchOutcome(batch[-1].row.key, RowCounts(read=len(batch)))
        rows = []
        for row in batch:
            if row.text:
                rows.append(row)
            else:
                outcome.without_point.append(row.row.key)
                if row.failure is None:
                    outcome.counts.skipped += 1
                else:
                    _note_failure(outcome, row.row, "compose", row.failure)
        if rows:
            self._write(rows, outcome)
        return outcome

    def _write(self, rows: list[ComposedRow], outcome: BatchOutcome) -> None:
        hashes = [text_hash(row.text) for row in rows]
        known = self._find_vectors(rows, hashes)
        missing = {hashed: row.text for row, hashed in zip(rows, hashes, strict=True) if hashed not in known}
        embedded, rejected = self._embed(missing, known, outcome)
        kept = []
        for index, row in enumerate(rows):
            if error := rejected.get(hashes[index]):
                _note_failure(outcome, row.row, "embed", error)
                outcome.without_point.append(row.row.key)
            else:
                kept.append(index)
                outcome.counts.truncated += row.truncated
        outcome.counts.embedded += len(embedded)
        outcome.counts.reused += len(kept) - len(embedded)
        if not kept:
            return
        points = PointBatch(
            keys=[rows[index].row.key for index in kept],
            texts=[rows[index].text for index in kept],
            metadata=[rows[index].metadata for index in kept],
            row_hashes=[rows[index].row.row_hash for index in kept],
            text_hashes=[hashes[index] for index in kept],
            buckets=[rows[index].row.bucket for index in kept],
            vectors=np.stack([known[hashes[index]] for index in kept]),
        )
        self._patiently(lambda: self._store.upsert(self._set, points))
        outcome.written = points.keys
        positions = [position for position, hashed in enumerate(points.text_hashes) if hashed in embedded]
        self._memory.note_written(
            [points.text_hashes[position] for position in positions], [points.keys[position] for position in positions]
        )

    def _find_vectors(self, rows: list[ComposedRow], hashes: list[int]) -> dict[int, Vectors]:
        """Vectors that need not be paid for again, by text hash: of this row in an older set, or of an equal text."""
        known = self._memory.recall(hashes)
        for vector_set in self._reuse_from:
            wanted = {row.row.key: hashed for row, hashed in zip(rows, hashes, strict=True) if hashed not in known}
            known.update(self._read_vectors(vector_set, wanted))
        unknown = [hashed for hashed in hashes if hashed not in known]
        elsewhere = {key: hashed for hashed, key in self._memory.find_written(unknown).items()}
        known.update(self._read_vectors(self._set, elsewhere))
        return known

    def _read_vectors(self, vector_set: VectorSet, wanted: dict[Key, int]) -> dict[int, Vectors]:
        """Of the points of these keys, the vectors of those that still have the text wanted, by text hash."""
        if not wanted:
            return {}
        stored = self._patiently(partial(self._store.vectors, vector_set, list(wanted)))
        return {hashed: vector for key, (hashed, vector) in stored.items() if wanted.get(key) == hashed}

    def _embed(
        self, missing: dict[int, str], known: dict[int, Vectors], outcome: BatchOutcome
    ) -> tuple[set[int], dict[int, TextRejected]]:
        """Adds the missing vectors to `known`; gives which texts were embedded here, and which the provider rejects."""
        embedded: set[int] = set()
        rejected: dict[int, TextRejected] = {}
        while missing:
            mine, others = self._memory.claim(missing)
            found = self._embed_claimed({hashed: missing[hashed] for hashed in mine}, outcome)
            embedded.update(hashed for hashed, vector in found.items() if not isinstance(vector, TextRejected))
            for hashed, future in others.items():
                if (theirs := future.result().get(hashed)) is not None:
                    found[hashed] = theirs
            for hashed, vector in found.items():
                if isinstance(vector, TextRejected):
                    rejected[hashed] = vector
                else:
                    known[hashed] = vector
            # what is left: the batch that was at it failed, and this one tries it in its place
            missing = {
                hashed: text for hashed, text in missing.items() if hashed not in known and hashed not in rejected
            }
        return embedded, rejected

    def _embed_claimed(self, claimed: dict[int, str], outcome: BatchOutcome) -> dict[int, Vectors | TextRejected]:
        found: dict[int, Vectors | TextRejected] = {}
        try:
            if claimed:
                result = self._embedder.embed(list(claimed.values()))
                outcome.counts.tokens += result.tokens
                for index, hashed in enumerate(claimed):
                    found[hashed] = result.failed.get(index) or result.vectors[index]
        finally:
            self._memory.resolve(list(claimed), dict(found))
        return found


def _note_failure(outcome: BatchOutcome, row: SourceRow, step: str, error: RowError) -> None:
    outcome.counts.failed += 1
    outcome.failures.append(RowFailure(row.key, row.row_hash, step, error.code, error.message))


def process_in_order(
    executor: Executor,
    pipeline: RowPipeline,
    batches: Iterator[list[ComposedRow]],
    *,
    max_batches: int,
    max_bytes: int,
    check: Callable[[], None],
) -> Iterator[BatchOutcome]:
    """The outcome of each batch, in the order of the batches, with up to `max_batches` in flight.

    Raises what a batch raised; no batch is at work any more when it ends, in whichever way.
    """
    in_flight: deque[tuple[int, Future[BatchOutcome]]] = deque()
    bytes_in_flight = 0
    try:
        for batch in batches:
            check()
            size = sum(row.size_bytes for row in batch)
            while in_flight and (
                in_flight[0][1].done() or len(in_flight) >= max_batches or bytes_in_flight + size > max_bytes
            ):
                done_size, future = in_flight.popleft()
                bytes_in_flight -= done_size
                yield future.result()
            in_flight.append((size, executor.submit(pipeline.process, batch)))
            bytes_in_flight += size
        while in_flight:
            check()
            yield in_flight.popleft()[1].result()
    finally:
        for _size, future in in_flight:
            future.cancel()
        wait([future for _size, future in in_flight])
