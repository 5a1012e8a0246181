"""Lists: newest first, in pages, with an opaque cursor.

A cursor is only a position in an order. Every list is filtered by the environment of the request, so a forged cursor shows
nothing that the caller could not list anyway.
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
_MAX_CURSOR: Final = 16_000  # a cursor of failed rows contains a key, which may be a long text
_DIGEST_LENGTH: Final = 12
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_MICROSECONDS: Final = 253_402_300_799_999_999  # the end of the year 9999

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Largest number of items in the page")]
Cursor = Annotated[
    str | None,
    Query(
        max_length=_MAX_CURSOR,
        pattern="^[A-Za-z0-9_-]+$",
        description="`pagination.next_cursor` of the previous page. Default: the first page",
    ),
]
_NO_NUL: Final = r"^[^\x00]*$"
NameFilter = Annotated[
    str | None, Query(max_length=100, pattern=_NO_NUL, description="Only the items with exactly this name")
]


def text_filter(description: str, *, max_length: int = 100) -> Any:
    """The `Query` of a filter that compares a text exactly."""
    return Query(max_length=max_length, pattern=_NO_NUL, description=description)


class Pagination(Answer):
    """The position of a page in its list."""

    limit: int = Field(description="The requested page size")
    has_more: bool = Field(description="Whether another page follows")
    next_cursor: str | None = Field(description="`cursor` of the next page; null on the last page")


class ListAnswer(Answer, Generic[T]):
    """One page of a list, newest first. Items added in the meantime do not move it."""

    data: list[T]
    pagination: Pagination


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The requested page."""

    limit: int
    after: Position | None
    filters: str = ""
    """A digest of the filters, which the cursors contain."""

    @classmethod
    def read(cls, limit: int, cursor: str | None, **filters: str | None) -> PageRequest:
        """The page after the cursor. Raises ValidationFailed if the cursor belongs to a list with other filters."""
        digest = _digest(filters)
        return cls(limit, read_cursor(cursor, digest), digest)


def _digest(filters: Mapping[str, str | None]) -> str:
    """A short digest of these filters; empty if there are none."""
    given = sorted((name, value) for name, value in filters.items() if value is not None)
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:_DIGEST_LENGTH] if given else ""


def read_cursor(cursor: str | None, filters: str = "") -> Position | None:
    """The position that `write_cursor` made this cursor of. Raises ValidationFailed for any other text."""
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        number, separator, object_id = raw.partition(":")
        number, _, own_filters = number.partition(".")
        microseconds = int(number)
        position = Position(_EPOCH + timedelta(microseconds=microseconds), object_id)
        is_ours = 0 <= microseconds <= _MAX_MICROSECONDS and separator and object_id and "\x00" not in object_id
    except (binascii.Error, ValueError, OverflowError):
        is_ours = False
    if not is_ours or write_cursor(position, own_filters) != cursor:
        raise ValidationFailed(
            "cursor: this API did not issue it.", resolution="Start at the first page, without a cursor."
        )
    if own_filters != filters:
        raise ValidationFailed(
            "cursor: it belongs to a list with other filters.",
            resolution="Send the filters of the previous page, or start at the first page, without a cursor.",
        )
    return position


def position_at(index: int) -> Position:
    """The position before the item with this index, for lists that are not ordered by time."""
    return Position(_EPOCH + timedelta(microseconds=index), "#")


def index_of(position: Position | None) -> int:
    """The index of a position from `position_at`; 0 for None."""
    return 0 if position is None else (position.created_at - _EPOCH) // timedelta(microseconds=1)


def write_cursor(position: Position, filters: str = "") -> str:
    """The cursor of a position in a list with these filters."""
    microseconds = (position.created_at - _EPOCH) // timedelta(microseconds=1)
    place = f"{microseconds}.{filters}" if filters else str(microseconds)
    return base64.urlsafe_b64encode(f"{place}:{position.object_id}".encode()).rstrip(b"=").decode()


def list_answer(kind: type[L], page: Page[S], asked: PageRequest, shown: Callable[[S], Any]) -> L:
    """The page as a response body of this type."""
    shown_items = [shown(item) for item in page.items]
    return kind(data=shown_items, pagination=pagination(page.next, asked.limit, asked.filters))


def whole_list(kind: type[L], items: Sequence[Any]) -> L:
    """A list that always fits in one page."""
    return kind(data=list(items), pagination=pagination(None, len(items)))


def pagination(following: Position | None, limit: int, filters: str = "") -> Pagination:
    """The `pagination` part of a response body."""
    cursor = write_cursor(following, filters) if following else None
    return Pagination(limit=limit, has_more=following is not None, next_cursor=cursor)
