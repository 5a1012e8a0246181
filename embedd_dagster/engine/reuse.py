"""The texts that a run has already embedded: a duplicate text in the table costs one embedding.

Three layers, each for what the one before forgets: the vectors used last are kept in memory; a text that another batch is
embedding at the moment is waited for; for every text written, the key of one row that has it is kept in a temporary SQLite
file (which ends with the process), so that its vector can be read from the set. Memory does not grow with the table.

All of it costs 2 µs per row: per row there are only dict and NumPy operations, and SQLite gets thousands of rows at once.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final

import numpy as np
import orjson

from embedd_dagster.core.keys import Key, decode_key, encode_key
from embedd_dagster.core.rows import Vectors
from embedd_dagster.errors import TextRejected

VECTOR_BYTES: Final = 24 * 2**20
"""How much memory the vectors of the texts embedded last may take."""
_BLOOM_BITS: Final = 26  # 8 MB: with five million texts, 1 % of the lookups find nothing
_VARIABLES_PER_STATEMENT: Final = 500
# In the order of their random hashes, this many rows are inserted at a third of the cost per row of a batch.
_ROWS_PER_WRITE: Final = 8192

EmbeddingInFlight = Future[Mapping[int, Vectors | TextRejected]]
"""What becomes of the texts of one batch, by hash. A missing one has to be tried again, because the batch failed."""


class TextMemory:
    """What a run knows of the texts it has embedded. Safe to use from several threads; close it at the end."""

    def __init__(self, max_vector_bytes: int = VECTOR_BYTES, *, rows_per_write: int = _ROWS_PER_WRITE) -> None:
        self._max_bytes = max_vector_bytes
        self._rows_per_write = rows_per_write
        self._bytes = 0
        self._vectors: OrderedDict[int, Vectors] = OrderedDict()
        self._in_flight: dict[int, EmbeddingInFlight] = {}
        self._bloom = np.zeros(1 << (_BLOOM_BITS - 3), dtype=np.uint8)
        self._unwritten: dict[int, Key] = {}
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()
        # "" is a file that SQLite makes in the temporary directory and removes at once
        self._file = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._file.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -8192;"
            "CREATE TABLE written (hash INTEGER PRIMARY KEY, key TEXT NOT NULL);"
        )

    def recall(self, hashes: Iterable[int]) -> dict[int, Vectors]:
        """The vectors of those texts that are in memory."""
        found = {}
        with self._lock:
            for hashed in hashes:
                vector = self._vectors.get(hashed)
                if vector is not None:
                    # a copy: a view would keep the whole answer's array in memory
                    found[hashed] = self._vectors[hashed] = vector if vector.base is None else vector.copy()
                    self._vectors.move_to_end(hashed)
        return found

    def claim(self, hashes: Iterable[int]) -> tuple[list[int], dict[int, EmbeddingInFlight]]:
        """Which of these texts the caller must embed, and those that another batch is embedding.

        The caller must `resolve` its own before it waits for the others, so that no two batches wait for each other.
        """
        mine, others = [], {}
        own: EmbeddingInFlight = Future()  # one per batch: one per text cost a quarter of the engine's CPU
        with self._lock:
            for hashed in hashes:
                if (future := self._in_flight.get(hashed)) is not None:
                    others[hashed] = future
                else:
                    self._in_flight[hashed] = own
                    mine.append(hashed)
        return mine, others

    def resolve(self, claimed: Sequence[int], outcomes: Mapping[int, Vectors | TextRejected]) -> None:
        """Gives the outcomes of a claim to the batches that wait for them, and keeps the vectors while there is room."""
        if not claimed:
            return
        with self._lock:
            for hashed in claimed:
                future = self._in_flight.pop(hashed)
                outcome = outcomes.get(hashed)
                if isinstance(outcome, np.ndarray) and hashed not in self._vectors:
                    self._vectors[hashed] = outcome
                    self._bytes += outcome.nbytes
            while self._bytes > self._max_bytes:
                _oldest, forgotten = self._vectors.popitem(last=False)
                self._bytes -= forgotten.nbytes
        future.set_result(outcomes)

    def note_written(self, keys: Mapping[int, Key]) -> None:
        """Remembers where texts can be found again, by hash: in the points of these keys, which are durable."""
        if not keys:
            return
        with self._file_lock:
            for positions in self._positions(list(keys)):
                np.bitwise_or.at(self._bloom, positions >> 3, (1 << (positions & 7)).astype(np.uint8))
            self._unwritten.update(keys)
            if len(self._unwritten) >= self._rows_per_write:
                entries = {hashed: encode_key(self._unwritten[hashed]) for hashed in sorted(self._unwritten)}
                # one statement: `executemany` releases and takes the interpreter lock with every row
                self._file.execute(
                    "INSERT OR IGNORE INTO written SELECT key, value FROM json_each(?)",
                    [orjson.dumps(entries, option=orjson.OPT_NON_STR_KEYS).decode()],
                )
                self._unwritten.clear()

    def find_written(self, hashes: Sequence[int]) -> dict[int, Key]:
        """The key of a row for each of those texts that this run has written."""
        if not hashes:
            return {}
        maybe = np.ones(len(hashes), dtype=bool)
        for positions in self._positions(hashes):
            maybe &= (self._bloom[positions >> 3] >> (positions & 7)) & 1 == 1
        asked = [hashes[position] for position in np.nonzero(maybe)[0].tolist()]
        found: dict[int, Key] = {}
        for start in range(0, len(asked), _VARIABLES_PER_STATEMENT):
            some = asked[start : start + _VARIABLES_PER_STATEMENT]
            marks = ", ".join("?" * len(some))
            with self._file_lock:
                found.update((hashed, self._unwritten[hashed]) for hashed in some if hashed in self._unwritten)
                rows = self._file.execute(f"SELECT hash, key FROM written WHERE hash IN ({marks})", some).fetchall()  # noqa: S608 - question marks alone
            found.update((hashed, decode_key(key)) for hashed, key in rows)
        return found

    @staticmethod
    def _positions(hashes: Sequence[int]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        # a 64-bit hash is two independent positions in the Bloom filter
        bits = np.array(hashes, dtype=np.int64).view(np.uint64)
        mask = np.uint64((1 << _BLOOM_BITS) - 1)
        return [((bits >> np.uint64(shift)) & mask).astype(np.int64) for shift in (0, 32)]

    def close(self) -> None:
        """Removes the temporary file."""
        self._file.close()
