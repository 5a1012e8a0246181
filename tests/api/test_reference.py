"""The generated pages of `docs/reference/` are those of the code."""

from __future__ import annotations

import pytest

from scripts.reference import DIRECTORY, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    assert (DIRECTORY / name).read_text(encoding="utf-8") == PAGES[name](), f"docs/reference/{name}: run make docs"


def test_reference_has_no_other_pages() -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == set(PAGES)
