"""Strict JSON bodies: no NaN, no repeated names, limited nesting, no text that a database cannot hold.

A body is parsed only when its schema validates it, after the request was authenticated.
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
_MAX_EXACT: Final = 2**53  # not every larger whole number is a float
_MAX_SHOWN: Final = 64
_RESOLUTION: Final = "Send one JSON object (RFC 8259) in UTF-8."


@dataclass(frozen=True, slots=True)
class RawBody:
    """A JSON body that has not been parsed yet."""

    content: bytes


class StrictRequest(Request):
    """A request whose JSON body stays unparsed until its schema validates it."""

    async def json(self) -> Any:
        """The unparsed body; None for `null`, which counts as no body."""
        content = await self.body()
        return None if content.strip() == b"null" else RawBody(content)


class StrictRoute(APIRoute):
    """A route whose bodies `parse_json` parses."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """FastAPI's handler, with a StrictRequest."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def validate_body(model: type[B], content_type: str | None, content: bytes) -> B:
    """The body as a StrictRoute passes it to an endpoint. Raises the same errors."""
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}])
    value: Any = content
    if content_type == "application/json" or _is_json(content_type):
        value = None if content.strip() == b"null" else RawBody(content)
    return validate_value(model, value)


def validate_value(model: type[B], value: Any, *location: str) -> B:
    """The body, or the part of it at this location, as the model reads it. Raises RequestValidationError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=True, include_input=False)
        raise RequestValidationError(
            [{**fault, "loc": ("body", *location, *fault["loc"])} for fault in faults]
        ) from None


def _is_json(content_type: str | None) -> bool:
    if not content_type:
        return False
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def parse_body(value: Any) -> Any:
    """The value that a schema validates. Raises ValidationFailed if the body is not JSON."""
    if isinstance(value, RawBody):
        return parse_json(value.content)
    if isinstance(value, bytes):
        raise ValidationFailed(
            "Content-Type: `application/json` is expected.", resolution="Send Content-Type: application/json."
        )
    return value


def parse_json(content: bytes) -> Any:
    """The value of a JSON text. Raises ValidationFailed that names the position or the field."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_reject_constant, object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise ValidationFailed("body: the text is not UTF-8.", resolution=_RESOLUTION) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValidationFailed(f"body: malformed JSON at {where}: {error.msg}.", resolution=_RESOLUTION) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # a number with thousands of digits
        raise ValidationFailed("body: a number is too long.", resolution=_RESOLUTION) from None
    _check(value, [])
    return _whole(value)


def _whole(value: Any) -> Any:
    """The value with 5.0 as 5: in JSON, a number without a fraction is whole, however it is written."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _MAX_EXACT else value
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValidationFailed(f"body: {name} is not JSON.", resolution=_RESOLUTION)


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members. Raises ValidationFailed if a name is repeated: either value could be meant."""
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
    """Raises ValidationFailed that names the field. `path` leads to the value; one list serves the whole body."""
    if len(path) >= MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValidationFailed(f"{_field(path)}: the number is out of the range of 64-bit floats.")
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
        raise ValidationFailed(f"{_field(path)}: a text must not contain NUL (U+0000).")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValidationFailed(f"{_field(path)}: a text must not contain a lone surrogate (\\ud800 to \\udfff).")


def _field(path: list[str | int]) -> str:
    """Such as `columns[2].name`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_SHOWN]}" for step in path)
    return "".join(steps).removeprefix(".") or "body"
