"""Suggests an operation for a request with an unknown path or method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, Final

_MIN_SIMILARITY: Final = 0.6
_SYNONYMS: Final = {
    "keys": "api-keys",
    "models": "embedding-models",
    "jobs": "tasks",
    "search": "query",
    "envs": "environments",
}
_METHODS: Final = {"PATCH": "PUT"}


def nearest_operation(paths: Mapping[str, Any], method: str, path: str) -> str | None:
    """The most similar operation, such as `GET /v1/tasks`; None if no path is similar.

    `paths` is the part of the OpenAPI document with this name.
    """
    wanted = _segments(path)
    if method == "POST" and wanted == ["v1", "connections"]:
        return next(f"POST {template}" for template in paths if template.startswith("/v1/providers/"))
    wanted_method = _METHODS.get(method, method)
    best: tuple[float, bool] = (0.0, False)
    found = None
    for template, operations in paths.items():
        similarity = _similarity(wanted, template.strip("/").split("/"))
        if similarity is None:
            continue
        for own_method in operations:
            rank = (similarity, own_method.upper() == wanted_method)
            if rank > best:
                best, found = rank, f"{own_method.upper()} {template}"
    return found


def _segments(path: str) -> list[str]:
    """The parts of the path in this API's spelling: lower case, with hyphens, under `v1`."""
    parts = [re.sub(r"(?<=[a-z])(?=[A-Z])", "-", part) for part in path.split("/") if part]
    parts = [part.lower().replace("_", "-") if "-" in part or part.isalpha() or "_" in part else part for part in parts]
    parts = [_SYNONYMS.get(part, part) for part in parts if part != "api"]
    return parts if parts[:1] == ["v1"] else ["v1", *parts]


def _similarity(wanted: list[str], template: list[str]) -> float | None:
    """The similarity of the path and the template, up to 1; None if they are not similar."""
    if len(wanted) != len(template):
        return None
    total = 0.0
    for given, own in zip(wanted, template, strict=True):
        similarity = 0.9 if own.startswith("{") else SequenceMatcher(None, given, own).ratio()
        if similarity < _MIN_SIMILARITY:
            return None
        total += similarity
    return total / len(template)
