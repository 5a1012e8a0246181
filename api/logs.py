"""Logging: one JSON object per line on standard error. Never a secret, the text of a question or the content of a row.

Records of other libraries (mostly uvicorn) become such lines too, without stack traces, whose last line may quote a row.
Uvicorn's access log is off: it contains paths and parameters as clients sent them, and `RequestContext` logs every request.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import structlog

from embedd_dagster.logs import LossyLogger, is_set_up

_MAX_MESSAGE: Final = 1000
_TRACE: Final = "Traceback (most recent call last)"


def configure() -> None:
    """Configures structlog and the standard library's logging, unless the process has already done so."""
    if is_set_up():
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # a line that cannot be written is dropped: an exception would turn a committed request into a 500
        logger_factory=lambda *_: LossyLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.getLogger().addHandler(_Forward())
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False


class _Forward(logging.Handler):
    """Passes records of the standard library to structlog: the message, and only the type of an exception."""

    def emit(self, record: logging.LogRecord) -> None:
        more: dict[str, Any] = {"logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            more["kind"] = record.exc_info[0].__name__
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - a log line that cannot be formatted must not fail a request
            message = str(record.msg)
        if _TRACE in message:  # Starlette's report of a failed start: the error itself is enough
            message = message.strip().splitlines()[-1]
        structlog.get_logger("embedd.api").log(record.levelno, message.strip()[:_MAX_MESSAGE], **more)
