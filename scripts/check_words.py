"""Finds words that this project does not use: private, archaic or replaced ones (docs/glossary.md has the standard words).

Reads .py and .md files, prints `file:line: word: what to write instead`, and exits with 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the lists themselves, and records of what was measured
EXCLUDED = (
    "scripts/check_words.py",
    "tests/docs/test_words.py",
    "docs/glossary.md",
    "docs/benchmarks.md",
    "benchmarks/results/",
)

WORDS = {
    r"who(m|so)?ever": "the person or process that …",
    r"what(so)?ever|whichever": "name the thing, or `any`",
    r"anew": "again",
    r"but for": "except",
    r"so-manieth": "Nth",
    r"be it|were it": "if it is",
    r"by now": "already, or leave it out",
    r"beside": "next to, besides",
    r"lest|whence|thence|wherein|unto|thereof|nay": "a word of today",
    r"(?<!there )is no (?!longer|more|other)": "is not a",
    r"(?<=[,;] )else": "otherwise",
    r"tells? of": "reports, describes",
    r"(?:requests|queries|changes|tokens|calls|rows|texts|times) a (?:second|minute|hour)": "per",
    r"patience|patiently": "retry, deadline or timeout",
    r"followers?": "CDC consumer",
    r"followed (tables?|sources?)|followables?": "CDC table, CDC source",
    r"change[- ]feeds?": "CDC stream",
    r"change[- ]capture": "CDC",
    r"noted keys?|notedkeys": "buffered changes",
    r"owed|owes": "pending",
    r"bury|buried|buries": "mark the run as failed",
    r"life signs?": "heartbeat",
    r"dead letters?": "failed row",
    r"control database": "catalog",
    r"the card": "say what it says",
}
# names of documents that are not in this repository
DOCUMENTS = re.compile(r"\b(SPEC|DESIGN|STYLE|LANGUAGE)( §|\.md)|§|\bthe seed\b")
_PATTERN = re.compile("|".join(rf"(?P<w{n}>\b(?:{word})\b)" for n, word in enumerate(WORDS)), re.IGNORECASE)
_TEST_NAME = re.compile(r"def (test_(?:nor|and|or|but|which|also|neither|so)(?:_\w*)?)\(")
_HINTS = list(WORDS.values())


def find_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Each hit as (line number from 1, the word, what to write instead)."""
    for number, line in enumerate(text.splitlines(), start=1):
        for hit in _PATTERN.finditer(line):
            yield number, hit[0].strip(), _HINTS[int((hit.lastgroup or "w0")[1:])]
        for hit in DOCUMENTS.finditer(line):
            yield number, hit[0], "say what it says, or link to a page under docs/"
        for hit in _TEST_NAME.finditer(line):
            yield number, hit[1], "a name that states the behaviour on its own"


def main() -> None:
    """Checks the whole checkout."""
    count = 0
    for path in sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.md")]):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith((".", *EXCLUDED)):
            continue
        for line, word, instead in find_words(path.read_text(encoding="utf-8")):
            print(f"{name}:{line}: {word}: {instead}")  # noqa: T201
            count += 1
    if count:
        sys.exit(f"{count} words to replace")


if __name__ == "__main__":
    main()
