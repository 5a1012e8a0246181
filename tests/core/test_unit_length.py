"""Vectors brought to length 1, of every size that float32 has."""

from __future__ import annotations

import numpy as np
import pytest

from embedd_dagster.core.unit_length import to_unit_length

DIRECTION = np.array([0.6, -0.8, 0.0], dtype=np.float32)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-13, 0.5, 1.0, 3.0, 1e13, 1e20, 3e38])
def test_a_vector_of_any_size_keeps_its_direction(size: float) -> None:
    unit, usable = to_unit_length((DIRECTION.astype(np.float64) * size).astype(np.float32).reshape(1, -1))
    assert usable is None
    np.testing.assert_allclose(unit[0], DIRECTION, atol=1e-6)
    assert unit.dtype == np.float32


def test_vectors_of_length_one_stay_as_they_are_to_the_bit() -> None:
    vectors = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    unit, usable = to_unit_length(vectors.copy())
    assert usable is None
    np.testing.assert_array_equal(unit, vectors)


@pytest.mark.parametrize(
    "bad", [[0, 0, 0], [1e-44, 0, 0], [np.nan, 1, 1], [np.inf, 1, 1], [-np.inf, np.inf, 0], [1, np.nan, np.inf]]
)
def test_a_vector_without_a_direction_is_marked_and_the_others_are_kept(bad: list[float]) -> None:
    unit, usable = to_unit_length(np.array([DIRECTION, bad, 2 * DIRECTION], dtype=np.float32))
    assert usable is not None
    assert usable.tolist() == [True, False, True]
    np.testing.assert_allclose(unit[[0, 2]], [DIRECTION, DIRECTION], atol=1e-6)
    assert np.isnan(unit[1]).all()


def test_an_array_that_cannot_be_written_is_copied() -> None:
    vectors = 2 * DIRECTION.reshape(1, -1)
    vectors.flags.writeable = False
    unit, _usable = to_unit_length(vectors)
    np.testing.assert_allclose(unit[0], DIRECTION, atol=1e-6)
