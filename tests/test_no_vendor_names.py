"""Only connectors name an outside system: the other packages know them by the registry."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("embedd_dagster/core", "embedd_dagster/catalog", "embedd_dagster/engine", "embedd_dagster/defs", "api")
_VENDOR = re.compile(r"postgres|psycopg|pgvector|qdrant|openai|gemini|voyage|snowflake|minilm", re.IGNORECASE)
_OWN_CATALOG = re.compile(r"postgresql|psycopg", re.IGNORECASE)
"""The catalog itself is a PostgreSQL database."""
ALLOWED = {
    "embedd_dagster/core/floats.py": (
        "qdrant",
        "how floats are stored, until filters compare a source's exact doubles",
    ),
    "api/schemas/vector_tables.py": ("qdrant_collection", "a field of the public API"),
    "api/schemas/connections.py": ('examples=["postgresql"]', "an example in the description of the API"),
    "api/schemas/embedding_providers.py": ("openai", "the name of a protocol that many servers speak, and an example"),
    "api/routers/embedding_providers.py": ("openai's protocol", "the name of a protocol that many servers speak"),
}
"""By file: the text that may stand there, and why."""


def _strays(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text().lower()
    if name.startswith("embedd_dagster/catalog/"):
        text = _OWN_CATALOG.sub("", text)
    text = text.replace(ALLOWED.get(name, ("\0", ""))[0], "")
    return [
        f"{name}:{number}: {line.strip()}" for number, line in enumerate(text.split("\n"), 1) if _VENDOR.search(line)
    ]


def test_only_connectors_name_an_outside_system() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "migrations" not in path.parts]
    assert len(files) > 100
    assert [stray for path in sorted(files) for stray in _strays(path)] == []


def test_every_exception_is_needed() -> None:
    for name, (allowed, _reason) in ALLOWED.items():
        assert allowed in (ROOT / name).read_text().lower(), name
