"""What a run remembers of the texts it has embedded: in memory, and in a file for all that memory forgets."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import numpy as np
import pytest

from embedd_dagster.core.keys import Key
from embedd_dagster.engine.reuse import TextMemory


@pytest.fixture
def memory() -> Iterator[TextMemory]:
    memory = TextMemory(max_vector_bytes=3 * 4 * 4, rows_per_write=4)
    yield memory
    memory.close()


def embed(memory: TextMemory, vectors: dict[int, np.ndarray]) -> None:
    mine, _others = memory.claim(vectors)
    memory.resolve(mine, vectors)


def test_texts_are_found_whether_they_are_in_the_file_yet_or_not(memory: TextMemory) -> None:
    keys: dict[int, Key] = {
        -(2**63): 1, 2**63 - 1: 'a "key"', 0: UUID(int=7), 5: "ü\n", 6: -(2**63), 7: "", 8: 8, 9: 9, 10: 10,
    }  # fmt: skip
    for hashed, key in keys.items():
        memory.note_written({hashed: key})
    memory.note_written({5: "another row of the same text"})
    found = memory.find_written([*keys, 11, 12])
    assert found.pop(5) in ("ü\n", "another row of the same text")
    assert found == {hashed: key for hashed, key in keys.items() if hashed != 5}


def test_a_text_that_is_used_again_is_kept_without_the_answer_it_came_in(memory: TextMemory) -> None:
    answer = np.arange(12, dtype=np.float32).reshape(3, 4)
    embed(memory, dict(zip((1, 2, 3), answer, strict=True)))
    assert memory.recall([1])[1].base is None
    embed(memory, {4: answer[0], 5: answer[1]})
    assert sorted(memory.recall([1, 2, 3, 4, 5])) == [1, 4, 5]
    np.testing.assert_array_equal(memory.recall([1])[1], answer[0])
