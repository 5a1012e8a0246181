"""The word list of `make lint` finds what it names and leaves code and ordinary English alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

find_words = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "check_words.py"))["find_words"]


@pytest.mark.parametrize(
    "text",
    [
        "Whoever asks",
        "embedded anew",
        "all but for one",
        "a boolean is no primary key",
        "kept, else dropped",
        "60 requests a minute",
        "one follower per connection",
        "the contract (SPEC §1)",
        "def test_nor_by_leaving_its_own_page(page):",
    ],
)
def test_a_word_on_the_list_is_found_with_its_line(text: str) -> None:
    assert [line for line, *_ in find_words(f"\n{text}\n")][:1] == [2]


@pytest.mark.parametrize(
    "text",
    [
        "there is no other key; it is no longer used",
        "x = a if b else c",
        "outage_patience_seconds",
        "change data capture",
        "once a day",
        "def test_android(): ...",
    ],
)
def test_ordinary_text_is_not_found(text: str) -> None:
    assert list(find_words(text)) == []
