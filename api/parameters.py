"""Query parameters: none that the operation does not know, and none twice, as a typing error must not widen a request."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.types import Scope

from embedd_dagster.errors import ValidationFailed

from .auth import Reader

_MAX_SHOWN: Final = 64


def refuse_unknown_parameters(scope: Scope) -> None:
    """Returns if the operation knows every query parameter. Raises ValidationFailed that names those that it accepts."""
    if not scope["query_string"]:
        return
    given = Counter(name for name, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
    known = _known(scope)
    for name, times in given.items():
        shown = name[:_MAX_SHOWN]
        if name not in known:
            accepted = f"accepted: {', '.join(known)}" if known else "none is accepted here"
            raise ValidationFailed(f"{shown!r}: this query parameter is not known; {accepted}.")
        if times > 1:
            raise ValidationFailed(f"{shown}: this query parameter is given {times} times.")


def _known(scope: Scope) -> list[str]:
    """The query parameters of the operation, by what the OpenAPI document says of it."""
    paths: dict[str, Any] = scope["app"].openapi()["paths"]
    template = scope["route"].path_format
    # some versions of FastAPI leave out what the route's router was included under
    operations = paths.get(template) or paths.get(f"/v1{template}") or {}
    parameters = operations.get(scope["method"].lower(), {}).get("parameters", ())
    return [found["name"] for found in parameters if found["in"] == "query"]


def _after_the_key(request: Request, caller: Reader) -> None:  # noqa: ARG001 - who has no key learns nothing else
    refuse_unknown_parameters(request.scope)


def _at_once(request: Request) -> None:
    refuse_unknown_parameters(request.scope)


KNOWN_PARAMETERS: Final = [Depends(_after_the_key)]
"""The `dependencies` of every operation that takes a key."""
KNOWN_PARAMETERS_WITHOUT_KEY: Final = [Depends(_at_once)]
"""The same for an operation that takes none."""
