"""How an administrator removes by hand what a CDC stream created in a database."""

from __future__ import annotations


def removal_statement(name: str) -> str:
    """The statement that drops the slot of this name. Until then the server keeps its log for it."""
    return f"SELECT pg_drop_replication_slot('{name}');"


def leftover_resolution(name: str) -> str:
    """A sentence for a database that we cannot reach: the statements that drop the slot and the publication."""
    return f"If the database comes back later, run there: {removal_statement(name)} DROP PUBLICATION {name};"
