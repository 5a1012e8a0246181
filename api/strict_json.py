"""JSON bodies, read strictly: no NaN, no name twice, no bottomless nesting, no text that no database can hold.

The body is parsed only when its schema validates it, which is after the caller is known.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.message import Message
from typing import Any, Final, NoReturn, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from embedd_dagster.errors import ValidationFailed

B = TypeVar("B", bound=BaseModel)

MAX_DEPTH: Final = 32
_EXACT: Final = 2**53  # beyond, not every whole number is a float
_MAX_SHOWN: Final = 64
_RESOLUTION: Final = "Send one JSON object (RFC 8259) in UTF-8."


@dataclass(frozen=True, slots=True)
class RawBody:
    """A JSON body that is not parsed yet."""

    content: bytes


class StrictRequest(Request):
    """A request whose JSON body stays raw until a schema asks for it."""

    async def json(self) -> Any:
        """The body as it came; null is no body."""
        content = await self.body()
        return None if content.strip() == b"null" else RawBody(content)


class StrictRoute(APIRoute):
    """A route whose bodies are read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler over a StrictRequest."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def validate_body(model: type[B], content_type: str | None, content: bytes) -> B:
    """The body as FastAPI would give it to an endpoint. Raises as a StrictRoute does."""
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    value: Any = content
    if content_type == "application/json" or _is_json(content_type):
        value = None if content.strip() == b"null" else RawBody(content)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=True, include_input=False)
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults]) from None


def _is_json(content_type: str | None) -> bool:
    if not content_type:
        return False
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def parse_json(content: bytes) -> Any:
    """The value of a JSON text. Raises ValidationFailed that names the place."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise ValidationFailed("body: it is not UTF-8.", resolution=_RESOLUTION) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValidationFailed(f"body: malformed JSON at {where}: {error.msg}.", resolution=_RESOLUTION) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # a number of thousands of digits
        raise ValidationFailed("body: a number is too long.", resolution=_RESOLUTION) from None
    _check(value, [])
    return _whole(value)


def _whole(value: Any) -> Any:
    """The value with 5.0 as 5: to JSON a number is whole where it has no fraction, however it is written."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValidationFailed(f"body: {name} is not JSON.", resolution=_RESOLUTION)


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Which of two of one name is meant is not for us to guess."""
    value = dict(members)
    if len(value) < len(members):
        (twice, _), *_ = Counter(name for name, _ in members).most_common(1)
        raise ValidationFailed(
            f"body: the name {twice[:_MAX_SHOWN]!r} is given twice in one object.", resolution=_RESOLUTION
        )
    return value


def _too_deep() -> ValidationFailed:
    return ValidationFailed(f"body: nested deeper than {MAX_DEPTH} levels.")


def _check(value: Any, path: list[str | int]) -> None:
    """Raises ValidationFailed that names the place. `path` leads to the value, and is told only then: bodies are long."""
    if len(path) >= MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValidationFailed(f"{_place(path)}: the number is out of the range of 64-bit floats.")
    elif isinstance(value, dict | list):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(step, str):
                _check_text(step, path)
            path.append(step)
            _check(item, path)
            path.pop()


def _check_text(text: str, path: list[str | int]) -> None:
    if text.isascii() and "\x00" not in text:
        return
    if "\x00" in text:
        raise ValidationFailed(f"{_place(path)}: a text must not contain NUL (U+0000).")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValidationFailed(f"{_place(path)}: a text must not contain a lone surrogate (\\ud800 to \\udfff).")


def _place(path: list[str | int]) -> str:
    """Such as `columns[2].name`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_SHOWN]}" for step in path)
    return "".join(steps).removeprefix(".") or "body"
