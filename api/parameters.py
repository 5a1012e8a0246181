"""Rejects unknown and repeated query parameters: a misspelled filter must not widen a request."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.types import Scope

from embedd_dagster.errors import ValidationFailed

from .auth import Reader

_MAX_SHOWN: Final = 64


def reject_unknown_parameters(scope: Scope) -> None:
    """Returns if the operation knows every query parameter. Otherwise raises ValidationFailed that lists the known ones."""
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
    """The query parameters of the operation, from the OpenAPI document."""
    paths: dict[str, Any] = scope["app"].openapi()["paths"]
    template = scope["route"].path_format
    # some versions of FastAPI leave out the prefix that the router was included with
    operations = paths.get(template) or paths.get(f"/v1{template}") or {}
    parameters = operations.get(scope["method"].lower(), {}).get("parameters", ())
    return [found["name"] for found in parameters if found["in"] == "query"]


def _after_authentication(request: Request, caller: Reader) -> None:  # noqa: ARG001 - without a key, this is not checked
    reject_unknown_parameters(request.scope)


def _without_authentication(request: Request) -> None:
    reject_unknown_parameters(request.scope)


KNOWN_PARAMETERS: Final = [Depends(_after_authentication)]
"""The `dependencies` of operations that need a key."""
KNOWN_PARAMETERS_WITHOUT_KEY: Final = [Depends(_without_authentication)]
"""The `dependencies` of operations that need no key."""
