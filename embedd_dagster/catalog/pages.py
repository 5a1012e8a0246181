"""Keyset pagination over what has a creation time and an id: newest first, stable while rows are added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

T = TypeVar("T")


class Position(NamedTuple):
    """Where a page ended."""

    created_at: datetime
    object_id: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items, and where to go on; None at the end."""

    items: list[T]
    next: Position | None


def having(statement: Select[T], wanted: Mapping[InstrumentedAttribute[str], str | None]) -> Select[T]:
    """The statement with only the rows that have these values; None wants nothing."""
    for column, value in wanted.items():
        if value is not None:
            statement = statement.where(column == value)
    return statement


def fetch_page(session: Session, statement: Select[T], model: Any, limit: int, after: Position | None) -> Page[T]:
    """One page of the statement's rows. `model` is the mapped class that has `created_at` and `id`."""
    if after is not None:
        statement = statement.where(tuple_(model.created_at, model.id) < tuple_(after.created_at, after.object_id))
    rows = list(session.scalars(statement.order_by(model.created_at.desc(), model.id.desc()).limit(limit + 1)))
    if len(rows) <= limit:
        return Page(rows, None)
    last: Any = rows[limit - 1]
    return Page(rows[:limit], Position(last.created_at, last.id))
