"""What a request with a wrong path or method may have meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, Final

_LIKE: Final = 0.6
_WORDS: Final = {
    "keys": "api-keys",
    "models": "embedding-models",
    "jobs": "tasks",
    "search": "query",
    "envs": "environments",
}
_ELSEWHERE: Final = {("POST", "/v1/connections"): "POST /v1/providers/postgresql/connections"}
_METHODS: Final = {"PATCH": "PUT"}


def nearest_operation(paths: Mapping[str, Any], method: str, path: str) -> str | None:
    """The operation, such as `GET /v1/tasks`, that was most likely meant; None if nothing is like it.

    `paths` are those of the OpenAPI document.
    """
    wanted = _segments(path)
    elsewhere = _ELSEWHERE.get((method, "/" + "/".join(wanted)))
    if elsewhere is not None:
        return elsewhere
    wanted_method = _METHODS.get(method, method)
    best: tuple[float, bool] = (0.0, False)
    found = None
    for template, operations in paths.items():
        likeness = _likeness(wanted, template.strip("/").split("/"))
        if likeness is None:
            continue
        for its_method in operations:
            rank = (likeness, its_method.upper() == wanted_method)
            if rank > best:
                best, found = rank, f"{its_method.upper()} {template}"
    return found


def _segments(path: str) -> list[str]:
    """The path's parts as they are spelled here: small, with hyphens, under `v1`."""
    parts = [re.sub(r"(?<=[a-z])(?=[A-Z])", "-", part) for part in path.split("/") if part]
    parts = [part.lower().replace("_", "-") if "-" in part or part.isalpha() or "_" in part else part for part in parts]
    parts = [_WORDS.get(part, part) for part in parts if part != "api"]
    return parts if parts[:1] == ["v1"] else ["v1", *parts]


def _likeness(wanted: list[str], template: list[str]) -> float | None:
    """How like the path the template is, up to 1; None if not at all."""
    if len(wanted) != len(template):
        return None
    total = 0.0
    for given, own in zip(wanted, template, strict=True):
        likeness = 0.9 if own.startswith("{") else SequenceMatcher(None, given, own).ratio()
        if likeness < _LIKE:
            return None
        total += likeness
    return total / len(template)
