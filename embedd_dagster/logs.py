"""Log lines that are dropped when they cannot be written: a full disk or a closed pipe must not fail the work that logs."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO

import structlog


class LossyLogger:
    """Writes one line a message, for structlog; a line that cannot be written is lost."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, message: str) -> None:
        """Writes the line, and never raises for the file's sake."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            self._file.write(f"{message}\n")
            self._file.flush()

    log = debug = info = warn = warning = error = err = critical = fatal = exception = failure = msg


def lose_unwritable_lines() -> None:
    """Log lines of this process that cannot be written are dropped; how they look stays as it is.

    Does nothing in a process that has set structlog up for itself.
    """
    if not structlog.is_configured():
        structlog.configure(logger_factory=_to_stdout, cache_logger_on_first_use=False)


def is_set_up() -> bool:
    """Whether somebody has said how log lines look, rather than only `lose_unwritable_lines`."""
    return structlog.is_configured() and structlog.get_config()["logger_factory"] is not _to_stdout


def _to_stdout(*_: object) -> LossyLogger:
    # the stream of each moment: a program may replace it, as pytest does
    return LossyLogger(sys.stdout)
