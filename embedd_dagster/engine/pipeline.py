"""Rows → points of one vector set: compose → reuse or embed → upsert, with several batches in flight.

A batch is processed whole by one worker thread; batches of a shard end in the order in which they were read, so that a
checkpoint may follow each. What is in flight is bounded by bytes, not by rows. Processing a batch twice ends in the
same points: that, and checkpointing after the write, makes a killed run resumable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from embedd_dagster.catalog.failed_rows import RowFailure
from embedd_dagster.core.counts import RowCounts
from embedd_dagster.core.embedded_text import check_metadata_length, compose_text, metadata_reader, text_hashes
from embedd_dagster.core.keys import Key
from embedd_dagster.core.rows import PointBatch, SourceRow, Vectors, VectorSet
from embedd_dagster.core.shards import BatchLimits, pack_batches
from embedd_dagster.core.unit_length import to_unit_length
from embedd_dagster.core.vector_table import VectorConfiguration
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.pacing.embedder import PacedEmbedder
from embedd_dagster.engine.reuse import TextMemory
from embedd_dagster.errors import PointsRejected, RowError, TextRejected


class ComposedRow(NamedTuple):
    """A row with its text, which is "" if there is nothing to embed or if `failure` says why it cannot be.

    Flat, and without the values that were read: a text of a megabyte, of which a model reads only the beginning, must not
    wait in a queue.
    """

    key: Key
    row_hash: int
    bucket: int
    text: str = ""
    metadata: Mapping[str, object] = MappingProxyType({})
    metadata_length: int = 0
    """Characters of its texts; numbers are not counted, because there are few columns of them."""
    tokens: int = 0
    truncated: bool = False
    failure: RowError | None = None


def _size_bytes(row: ComposedRow) -> int:
    """About what the row holds in memory."""
    return 200 + 2 * (len(row.text) + row.metadata_length)


@dataclass(slots=True)
class BatchOutcome:
    """What became of one batch."""

    last_key: Key
    counts: RowCounts
    failures: list[RowFailure] = field(default_factory=list)
    without_point: list[Key] = field(default_factory=list)
    """Keys of skipped and failed rows: a point of an earlier version of the row is deleted."""
    written: list[Key] = field(default_factory=list)


class RowPipeline:
    """Turns rows into points of one vector set. Safe to use from several threads."""

    def __init__(
        self,
        context: RunContext,
        vector_set: VectorSet,
        configuration: VectorConfiguration,
        embedder: PacedEmbedder,
        *,
        reuse_from: Sequence[VectorSet],
        memory: TextMemory,
    ) -> None:
        """`reuse_from` are sets whose vectors may be taken for rows with the same text."""
        self.context = context
        self.vector_set = vector_set
        self.configuration = configuration
        self.concurrency = embedder.limits.concurrency
        """How many batches the provider takes at once."""
        self._embedder = embedder
        self._reuse_from = tuple(reuse_from)
        self._memory = memory
        positions = {name: index for index, name in enumerate(configuration.column_names)}
        self._text_columns = configuration.embedding_columns
        self._text_count = len(self._text_columns)
        text_positions = [positions[column.name] for column in self._text_columns]
        # embedding columns come first in a selection, so that nearly always a slice is enough
        self._text_positions = None if text_positions == list(range(self._text_count)) else text_positions
        self._metadata = [
            (name, positions[name], metadata_reader(kind)) for name, kind in configuration.filter_types.items()
        ]

    @property
    def limits(self) -> BatchLimits:
        """How large a batch may be."""
        return self._embedder.limits.batch

    def batches(self, pages: Iterable[list[SourceRow]]) -> Iterator[list[ComposedRow]]:
        """The rows of the pages, composed, in batches that one request to the provider can take. Lazy."""
        composed = (self.compose(row) for page in pages for row in page)
        return pack_batches(((row, row.tokens, _size_bytes(row)) for row in composed), self.limits)

    def compose(self, row: SourceRow) -> ComposedRow:
        """The row with its text, cut at the model's limit, and its metadata."""
        key, values, row_hash, bucket = row
        if self._text_positions is None:
            texts = values[: self._text_count]
        else:
            texts = tuple(values[position] for position in self._text_positions)
        text = compose_text(self._text_columns, texts)
        if not text:
            return ComposedRow(key, row_hash, bucket)
        try:
            metadata: dict[str, object] = {}
            length = 0
            for name, position, read in self._metadata:
                value = values[position]
                if value is not None and (value := read(value)) is not None:
                    metadata[name] = value
                    if type(value) is str:
                        length += len(value)
            check_metadata_length(length)
        except RowError as error:
            return ComposedRow(key, row_hash, bucket, failure=error)
        text, tokens, truncated = self._embedder.cut(text)
        return ComposedRow(key, row_hash, bucket, text, metadata, length, tokens, truncated)

    def process(self, batch: list[ComposedRow]) -> BatchOutcome:
        """Embeds and writes one batch; when it returns, every point of it is durable. Idempotent."""
        outcome = BatchOutcome(batch[-1].key, RowCounts(read=len(batch)))
        rows = []
        for row in batch:
            if row.text:
                rows.append(row)
            elif row.failure is None:
                outcome.without_point.append(row.key)
                outcome.counts.skipped += 1
            else:
                _note_failure(outcome, row, "compose", row.failure)
        if rows:
            self._write(rows, outcome)
        return outcome

    def _write(self, rows: list[ComposedRow], outcome: BatchOutcome) -> None:
        hashes = text_hashes([row.text for row in rows])
        known = self._find_vectors([row.key for row in rows], hashes)
        missing = {hashed: row.text for row, hashed in zip(rows, hashes, strict=True) if hashed not in known}
        embedded, rejected, cut = self._embed(missing, known, outcome)
        if rejected:
            for row, hashed in zip(rows, hashes, strict=True):
                if error := rejected.get(hashed):
                    _note_failure(outcome, row, "embed", error)
            rows = [row for row, hashed in zip(rows, hashes, strict=True) if hashed not in rejected]
            hashes = [hashed for hashed in hashes if hashed not in rejected]
        if cut:
            rows = [
                row._replace(text=cut[hashed], truncated=True) if hashed in cut else row
                for row, hashed in zip(rows, hashes, strict=True)
            ]
        rejected_rows = (
            self._upsert(rows, [known[hashed] for hashed in hashes], None if cut else hashes) if rows else {}
        )
        if rejected_rows:
            for index, reason in rejected_rows.items():
                _note_failure(outcome, rows[index], "write", reason)
            rows = [row for index, row in enumerate(rows) if index not in rejected_rows]
            hashes = [hashed for index, hashed in enumerate(hashes) if index not in rejected_rows]
            embedded.intersection_update(hashes)
        outcome.counts.embedded += len(embedded)
        outcome.counts.reused += len(rows) - len(embedded)
        outcome.counts.truncated += sum(row.truncated for row in rows)
        outcome.written = [row.key for row in rows]
        self._memory.note_written(
            {hashed: row.key for hashed, row in zip(hashes, rows, strict=True) if hashed in embedded}
        )

    def _upsert(
        self, rows: list[ComposedRow], vectors: list[Vectors], hashes: list[int] | None
    ) -> Mapping[int, RowError]:
        """Writes the rows; why the store cannot hold some of them, by index. `hashes` are those of the texts, if known."""
        keys, row_hashes, buckets, texts, metadata, _length, _tokens, _truncated, _failure = zip(*rows, strict=True)
        points = PointBatch(
            keys=list(keys),
            texts=list(texts),
            metadata=list(metadata),
            row_hashes=list(row_hashes),
            text_hashes=text_hashes(list(texts)) if hashes is None else hashes,
            buckets=list(buckets),
            vectors=np.concatenate(vectors).reshape(len(rows), -1),
        )
        try:
            self.context.write_as_owner(self.context.store.upsert, self.vector_set, points)
        except PointsRejected as error:
            return error.rejected
        return {}

    def _find_vectors(self, keys: list[Key], hashes: list[int]) -> dict[int, Vectors]:
        """Vectors that are not paid for again, by text hash: of this row in an older set, or of an equal text."""
        known = self._memory.recall(hashes)
        for vector_set in self._reuse_from:
            wanted = {key: hashed for key, hashed in zip(keys, hashes, strict=True) if hashed not in known}
            known.update(self._read_vectors(vector_set, wanted))
        unknown = [hashed for hashed in hashes if hashed not in known]
        elsewhere = {key: hashed for hashed, key in self._memory.find_written(unknown).items()}
        known.update(self._read_vectors(self.vector_set, elsewhere))
        return known

    def _read_vectors(self, vector_set: VectorSet, wanted: dict[Key, int]) -> dict[int, Vectors]:
        """Of the points of these keys, the vectors of those that still have the text wanted, by text hash."""
        if not wanted:
            return {}
        stored = self.context.retry(self.context.store.vectors, vector_set, list(wanted))
        found = {hashed: vector for key, (hashed, vector) in stored.items() if wanted.get(key) == hashed}
        if not found:
            return found
        # earlier versions stored vectors as they came; a vector without a direction is embedded again
        vectors, usable = to_unit_length(np.stack(list(found.values())))
        pairs = zip(found, vectors, strict=True)
        return (
            dict(pairs)
            if usable is None
            else {hashed: vector for (hashed, vector), good in zip(pairs, usable, strict=True) if good}
        )

    def _embed(
        self, missing: dict[int, str], known: dict[int, Vectors], outcome: BatchOutcome
    ) -> tuple[set[int], dict[int, TextRejected], dict[int, str]]:
        """Adds the missing vectors to `known`.

        Returns which texts were embedded here, which the provider rejects, and what is left of those that were too long.
        """
        embedded: set[int] = set()
        rejected: dict[int, TextRejected] = {}
        cut: dict[int, str] = {}
        while missing:
            mine, others = self._memory.claim(missing)
            found = self._embed_claimed({hashed: missing[hashed] for hashed in mine}, cut, outcome)
            embedded.update(hashed for hashed, vector in found.items() if not isinstance(vector, TextRejected))
            for hashed, future in others.items():
                if (theirs := future.result().get(hashed)) is not None:
                    found[hashed] = theirs
            for hashed, vector in found.items():
                if isinstance(vector, TextRejected):
                    rejected[hashed] = vector
                else:
                    known[hashed] = vector
            # the batch that had claimed what is left has failed: this one embeds it instead
            missing = {
                hashed: text for hashed, text in missing.items() if hashed not in known and hashed not in rejected
            }
        return embedded, rejected, cut

    def _embed_claimed(
        self, claimed: dict[int, str], cut: dict[int, str], outcome: BatchOutcome
    ) -> dict[int, Vectors | TextRejected]:
        found: dict[int, Vectors | TextRejected] = {}
        try:
            if claimed:
                result = self._embedder.embed(list(claimed.values()))
                outcome.counts.tokens += result.tokens
                hashes = list(claimed)
                found = dict(zip(hashes, result.vectors, strict=True))
                found.update((hashes[index], error) for index, error in result.failed.items())
                cut.update((hashes[index], text) for index, text in result.cut.items())
        finally:
            self._memory.resolve(list(claimed), dict(found))
        return found


def _note_failure(outcome: BatchOutcome, row: ComposedRow, step: str, error: RowError) -> None:
    outcome.without_point.append(row.key)
    outcome.counts.failed += 1
    outcome.failures.append(RowFailure(row.key, row.row_hash, row.bucket, step, error.code, error.message))


def process_in_order(
    executor: Executor,
    pipeline: RowPipeline,
    batches: Iterator[list[ComposedRow]],
    *,
    max_batches: int,
    max_bytes: int,
) -> Iterator[BatchOutcome]:
    """The outcome of each batch, in the order of the batches, with up to `max_batches` in flight.

    Raises what a batch raised. When it ends, in any way, no batch is running.
    """
    in_flight: deque[tuple[int, Future[BatchOutcome]]] = deque()
    bytes_in_flight = 0
    try:
        for batch in batches:
            pipeline.context.check()
            size = sum(map(_size_bytes, batch))
            while in_flight and (
                in_flight[0][1].done() or len(in_flight) >= max_batches or bytes_in_flight + size > max_bytes
            ):
                done_size, future = in_flight.popleft()
                bytes_in_flight -= done_size
                yield future.result()
            in_flight.append((size, executor.submit(pipeline.process, batch)))
            bytes_in_flight += size
        while in_flight:
            pipeline.context.check()
            yield in_flight.popleft()[1].result()
    finally:
        for _size, future in in_flight:
            future.cancel()
        wait([future for _size, future in in_flight])
