"""The table from our errors to what Dagster shows: a description, what happens next, and where; never a row's content."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import dagster as dg
from dagster._core.errors import DagsterUserCodeProcessError
from dagster_shared.error import SerializableErrorInfo

from embedd_dagster.errors import EmbeddError, PermanentError, RequestError, TransientError

_AGAIN: Final = (
    "reconcile_sensor launches the task again while attempts are left; after that the vector table is in `error`."
)
_STOPPED: Final = "The vector table is in `error`; what was live stays live."
_REFUSED: Final = "Nothing was changed."

_WHAT_HAPPENS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (TransientError, _AGAIN),
    (RequestError, _REFUSED),
    (PermanentError, _STOPPED),
    (EmbeddError, _STOPPED),
    (Exception, _AGAIN),
)


class ReadableFailure(DagsterUserCodeProcessError, dg.Failure):
    """A failure that Dagster shows by its message alone, without the stack of Dagster's own functions that ran the step.

    Dagster takes the error that another process has described as it is, instead of describing what was raised.
    """

    def __init__(self, description: str, metadata: Mapping[str, dg.MetadataValue]) -> None:
        dg.Failure.__init__(self, description, metadata=metadata, allow_retries=False)
        resolution = metadata.get("resolution")
        # the event that ends the run shows this and not the metadata
        message = f"{description}\n{resolution.value}" if resolution is not None else description
        self.user_code_process_error_infos = [SerializableErrorInfo(message, [], "Failure")]


def as_failure(error: Exception) -> dg.Failure:
    """What to raise `from None`: Dagster would show the messages of a chain, which may hold a row's content.

    Dagster retries nothing: the catalog counts attempts.
    """
    what_happens = next(text for kind, text in _WHAT_HAPPENS if isinstance(error, kind))
    metadata: dict[str, dg.MetadataValue] = {"what_happens": dg.MetadataValue.text(what_happens)}
    if isinstance(error, EmbeddError):
        description = error.message
        metadata["resolution"] = dg.MetadataValue.text(error.resolution)
        metadata["code"] = dg.MetadataValue.text(error.code)
    else:
        description = (
            f"Internal error: {type(error).__name__}. Its message is left out, as it may hold a row's content."
        )
        metadata["where"] = dg.MetadataValue.md("```\n" + _frames(error) + "\n```")
    return ReadableFailure(description, metadata)


def _frames(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return "\n".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
