"""Lists: newest first, a page at a time, by an opaque cursor.

A cursor says only where in an order to go on; every list is filtered by the caller's environment first, so a forged one
shows nothing that its forger could not list anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Generic, TypeVar

from fastapi import Query
from pydantic import Field

from embedd_dagster.catalog.pages import Page, Position
from embedd_dagster.errors import ValidationFailed

from .schemas.base import Answer

T = TypeVar("T")
S = TypeVar("S")
L = TypeVar("L", bound="ListAnswer[Any]")

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100
_MAX_CURSOR: Final = 16_000  # that of failed rows holds a key, which may be a long text
_TAG_LENGTH: Final = 12
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_MICROSECONDS: Final = 253_402_300_799_999_999  # the last of the year 9999

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="How many at the most")]
Cursor = Annotated[
    str | None,
    Query(
        max_length=_MAX_CURSOR,
        pattern="^[A-Za-z0-9_-]+$",
        description="`pagination.next_cursor` of the page before; left out, the first page",
    ),
]
_NO_NUL: Final = r"^[^\x00]*$"
NameFilter = Annotated[
    str | None, Query(max_length=100, pattern=_NO_NUL, description="Only those of exactly this name")
]


def text_filter(description: str, *, max_length: int = 100) -> Any:
    """The `Query` of a filter by a text, exactly."""
    return Query(max_length=max_length, pattern=_NO_NUL, description=description)


class Pagination(Answer):
    """Where a page stands in its list."""

    limit: int = Field(description="How many were asked for")
    has_more: bool = Field(description="Whether another page follows")
    next_cursor: str | None = Field(description="`cursor` of the next page, null on the last one")


class ListAnswer(Answer, Generic[T]):
    """One page of a list, newest first; what is added meanwhile does not shift it."""

    data: list[T]
    pagination: Pagination


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The page that is asked for."""

    limit: int
    after: Position | None
    filters: str = ""
    """What the list is filtered by, as its cursors say it."""

    @classmethod
    def read(cls, limit: int, cursor: str | None, **filters: str | None) -> PageRequest:
        """The page after the cursor. Raises ValidationFailed for a cursor of a list with other filters."""
        told = _tell(filters)
        return cls(limit, read_cursor(cursor, told), told)


def _tell(filters: Mapping[str, str | None]) -> str:
    """A short text that stands for these filters; an empty one for none."""
    given = sorted((name, value) for name, value in filters.items() if value is not None)
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:_TAG_LENGTH] if given else ""


def read_cursor(cursor: str | None, filters: str = "") -> Position | None:
    """The position that a cursor stands for. Raises ValidationFailed for anything that `write_cursor` has not made."""
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        number, separator, object_id = raw.partition(":")
        number, _, its_filters = number.partition(".")
        microseconds = int(number)
        position = Position(_EPOCH + timedelta(microseconds=microseconds), object_id)
        is_ours = 0 <= microseconds <= _MAX_MICROSECONDS and separator and object_id and "\x00" not in object_id
    except (binascii.Error, ValueError, OverflowError):
        is_ours = False
    if not is_ours or write_cursor(position, its_filters) != cursor:
        raise ValidationFailed(
            "cursor: it is not one that this API gave.", resolution="Start again at the first page, without a cursor."
        )
    if its_filters != filters:
        raise ValidationFailed(
            "cursor: it belongs to a list with other filters.",
            resolution="Send the filters of the page before, or start at the first page, without a cursor.",
        )
    return position


def position_at(index: int) -> Position:
    """The position before the item of this index, for lists that have an order of their own."""
    return Position(_EPOCH + timedelta(microseconds=index), "#")


def index_of(position: Position | None) -> int:
    """The index that `position_at` was given; 0 for None."""
    return 0 if position is None else (position.created_at - _EPOCH) // timedelta(microseconds=1)


def write_cursor(position: Position, filters: str = "") -> str:
    """The cursor of a position in a list with these filters."""
    microseconds = (position.created_at - _EPOCH) // timedelta(microseconds=1)
    place = f"{microseconds}.{filters}" if filters else str(microseconds)
    return base64.urlsafe_b64encode(f"{place}:{position.object_id}".encode()).rstrip(b"=").decode()


def list_answer(kind: type[L], page: Page[S], asked: PageRequest, shown: Callable[[S], Any]) -> L:
    """The page as an answer of this kind."""
    shown_items = [shown(item) for item in page.items]
    return kind(data=shown_items, pagination=pagination(page.next, asked.limit, asked.filters))


def whole_list(kind: type[L], items: Sequence[Any]) -> L:
    """A list that is never longer than one page."""
    return kind(data=list(items), pagination=pagination(None, len(items)))


def pagination(following: Position | None, limit: int, filters: str = "") -> Pagination:
    """The `pagination` part of an answer."""
    cursor = write_cursor(following, filters) if following else None
    return Pagination(limit=limit, has_more=following is not None, next_cursor=cursor)
