"""The exception tree: everything survives pickling, and every code is one of the contract's."""

import pickle

import pytest

from embedd_dagster import errors
from embedd_dagster.errors import EmbeddError, NotFound, TransientError

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EmbeddError)]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling(kind: type[EmbeddError]) -> None:
    error = kind("vector_table", "vt_1") if kind is NotFound else kind("It failed.", resolution="Do this.", column="x")
    if isinstance(error, TransientError):
        error.retry_after_seconds = 3.0
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = errors.__doc__ or ""
    missing = [kind.__name__ for kind in ALL if kind.__name__ not in drawn]
    assert missing == []


def test_the_packages_are_ours() -> None:
    import api
    import embedd_dagster

    for package in (api, embedd_dagster):
        assert package.__file__ is not None
        assert "/tests/" not in package.__file__
