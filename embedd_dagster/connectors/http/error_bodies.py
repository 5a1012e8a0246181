"""Reads the body of a refusal, in all the forms that embedding servers use.

OpenAI and Azure (`error.param`, `error.code`), FastAPI, Mistral and vLLM (pydantic's list of `type`, `loc` and `msg`, also
in a string), Google (`error.status`, `error.details`), Voyage (`detail`), validators that name the field as a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

import orjson

from embedd_dagster.connectors.http.retry_after import parse_duration

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_IDENTIFIER_KEYS: Final = ("code", "type", "error_type", "status")
_PARAMETER_KEYS: Final = frozenset(
    {"param", "parameter", "argument", "field", "property", "additionalProperty", "loc", "path", "target"}
)
_MESSAGE_KEYS: Final = frozenset({"message", "msg", "detail", "error", "errors", "description", "title", "reason"})
# parts of the request, repeated
_ECHO_KEYS: Final = frozenset({"input", "inputs", "input_value", "ctx", "request", "body", "value", "content", "url"})
# pydantic's list in a message, as JSON or as Python writes it
_QUOTED_LOCATION = re.compile(r"""["']loc["']\s*:\s*[\[(]([^\])]{1,200})[\])]""")
_DEEPEST: Final = 8
_MOST_PARTS: Final = 500


class Fault(NamedTuple):
    """A refusal. Only its identifiers may be shown to users: its message may quote a text or a part of the key."""

    identifiers: tuple[str, ...]
    parameters: tuple[str, ...]
    """The part of the request it is about, as the server writes it: `input`, `body.encoding_format`, `requests[0].content`."""
    message: str
    retry_after_seconds: float | None
    """From the body, as Google sends it."""


class _Part(NamedTuple):
    key: str
    value: Any


def read_fault(content: bytes) -> Fault:
    """The fault that the body reports; an empty one for no body or a page of HTML."""
    try:
        document: Any = orjson.loads(content)
    except ValueError:
        return Fault((), (), _plain_text(content), None)
    parts = list(islice(_walk("", document, _DEEPEST), _MOST_PARTS))
    delays = (part.value for part in parts if part.key == "retryDelay" and isinstance(part.value, str))
    return Fault(
        _identifiers(document),
        tuple(dict.fromkeys(_parameters(parts))),
        "\n".join(part.value for part in parts if part.key in _MESSAGE_KEYS and isinstance(part.value, str)),
        next(map(parse_duration, delays), None),
    )


def quoted_locations(message: str) -> list[str]:
    """The parameters named by a list of validation errors in a message."""
    return _QUOTED_LOCATION.findall(message)


def _plain_text(content: bytes) -> str:
    text = content.decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text


def _walk(key: str, value: Any, depth: int) -> Iterator[_Part]:
    """Every part of a document with its key; items of a list have the key of the list."""
    yield _Part(key, value)
    if depth == 0:
        return
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in _ECHO_KEYS:
                yield from _walk(name, item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(key, item, depth - 1)


def _parameters(parts: list[_Part]) -> Iterator[str]:
    for key, value in parts:
        if key in _PARAMETER_KEYS:
            if isinstance(value, list):
                yield ".".join(str(item) for item in value if isinstance(item, str | int))
            elif isinstance(value, str):
                yield value
        elif key and key not in _MESSAGE_KEYS and _is_complaint(value):
            yield key  # {"encoding_format": ["Unknown field."]}


def _is_complaint(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and " " in value


def _identifiers(document: Any) -> tuple[str, ...]:
    """The codes of the error itself, and of the items of its list."""
    if isinstance(document, list) and document:
        document = document[0]  # Gemini's adapter for OpenAI's protocol
    error = document.get("error", document) if isinstance(document, dict) else {}
    if isinstance(error, str):
        error = document
    if not isinstance(error, dict):
        return ()
    named = [error.get(key) for key in _IDENTIFIER_KEYS]
    for item in _items(error.get("details")):
        named.append(item.get("reason"))
    message = error.get("message")
    for item in _items(error.get("detail")) or _items(message.get("detail") if isinstance(message, dict) else message):
        named.append(item.get("type"))
    names = (str(name or "") for name in named)
    return tuple(dict.fromkeys(name for name in names if _IDENTIFIER.fullmatch(name)))


def _items(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
