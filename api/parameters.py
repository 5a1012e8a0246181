"""Query parameters: none that the operation does not know, and none twice, as a typing error must not widen a request."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.types import Scope

from api.auth import Reader
from embedd_dagster.errors import ValidationFailed

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
    for operation in operations_at(scope["app"], scope["path"], scope["method"]):
        return [found["name"] for found in operation.get("parameters", ()) if found["in"] == "query"]
    return []


def operations_at(app: Any, path: str, method: str) -> list[dict[str, Any]]:
    """The operations of the OpenAPI document that this method of this path may mean, the most literal path first."""
    fitting = [template for template in app.openapi()["paths"] if fits(template, path)]
    methods = [app.openapi()["paths"][template] for template in sorted(fitting, key=lambda found: found.count("{"))]
    return [found[method.lower()] for found in methods if method.lower() in found]


def fits(template: str, path: str) -> bool:
    """Whether a path is of this form, such as `/v1/tasks/{task_id}`."""
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path) is not None


def _after_the_key(request: Request, caller: Reader) -> None:  # noqa: ARG001 - who has no key learns nothing else
    refuse_unknown_parameters(request.scope)


def _at_once(request: Request) -> None:
    refuse_unknown_parameters(request.scope)


KNOWN_PARAMETERS: Final = [Depends(_after_the_key)]
"""The `dependencies` of every operation that takes a key."""
KNOWN_PARAMETERS_WITHOUT_KEY: Final = [Depends(_at_once)]
"""The same for an operation that takes none."""
