"""Qdrant's refusals as our errors, the same for REST and gRPC."""

from __future__ import annotations

import re
from typing import Final

from embedd_dagster.connectors.qdrant.limits import LIMIT_NAMES
from embedd_dagster.errors import VectorStoreRejected, VectorStoreUnavailable

_MAX_MESSAGE: Final = 300
_QUOTED: Final = re.compile(r'"([^"]*)"')
_PARAMETERS: Final = frozenset(
    {*LIMIT_NAMES, "limit", "timeout", "hnsw_ef", "exact", "oversampling", "upsert", "wait", "filter", "condition"}
)
"""Quoted words that may be shown: names of parameters. Any other quoted word may be a value of a row."""
_STRICT_MODE: Final = ". Help: "
_OVER_CAPACITY: Final = "try to split"
_RAISE_LIMIT: Final = (
    "Raise the limit in the strict_mode_config of this collection (PATCH /collections/{name}), then try again."
)
_SET_KEY: Final = "Set EMBEDD_QDRANT_API_KEY to a key of that Qdrant with the right to write."


class SetMissing(VectorStoreRejected):
    """The collection does not exist, or no longer."""


class LimitExceeded(VectorStoreRejected):
    """The call is more than the collection's strict mode allows; a smaller one may be allowed."""


def refusal(
    address: str, status: int, reason: str, *, has_key: bool, retry_after_seconds: float | None = None
) -> VectorStoreUnavailable | VectorStoreRejected:
    """The error for an answer with this HTTP status, or the HTTP status that a gRPC code stands for."""
    shown = shown_reason(reason)
    message = f"Qdrant at {address} answered {status}: {shown}"
    if (status in (400, 403) and _STRICT_MODE in reason) or (status == 429 and _OVER_CAPACITY in reason):
        return LimitExceeded(message, resolution=_RAISE_LIMIT)
    if status == 401 and not has_key:
        return VectorStoreRejected(f"Qdrant at {address} asks for an API key, and none is set.", resolution=_SET_KEY)
    if status in (401, 403):
        return VectorStoreRejected(
            f"Qdrant at {address} refuses the API key or the call (HTTP {status}): {shown}",
            resolution=f"{_SET_KEY} If the key is right, check that the server is not locked.",
        )
    if status in (408, 429) or status >= 500:
        return VectorStoreUnavailable(message, retry_after_seconds=retry_after_seconds)
    return SetMissing(message) if status == 404 else VectorStoreRejected(message)


def shown_reason(reason: str) -> str:
    """Qdrant's words with every quoted word blanked that may be a value of a row."""
    return _QUOTED.sub(lambda found: found[0] if found[1] in _PARAMETERS else '"…"', reason)[:_MAX_MESSAGE]


def no_answer(address: str) -> VectorStoreUnavailable:
    """The error for a call that took longer than its timeout."""
    return VectorStoreUnavailable(f"Qdrant at {address} did not answer in time.")


def unreachable(address: str, reason: str) -> VectorStoreUnavailable:
    """The error for a connection that cannot be made or was lost."""
    return VectorStoreUnavailable(f"Qdrant at {address} cannot be reached ({reason}).")
