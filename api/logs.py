"""Logging: one JSON object a line on standard error. Never a secret, a question's text or a row's content.

What other libraries log through the standard library (uvicorn, mostly) becomes such a line too, without its stack traces:
the last line of one may quote a row. Uvicorn's access log is silenced: it tells paths and parameters as they came, and
every request has a line of ours.
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
    """Sets structlog and the standard library's logging up, unless the process has done so already."""
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
        # a line that cannot be written is lost: raised, it would turn a committed request into a 500
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
    """Gives a record of the standard library to structlog: its message, and of an exception only the type."""

    def emit(self, record: logging.LogRecord) -> None:
        more: dict[str, Any] = {"logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            more["kind"] = record.exc_info[0].__name__
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - a log line that cannot be made must not end a request
            message = str(record.msg)
        if _TRACE in message:  # Starlette's word on a start that failed: the error itself is enough
            message = message.strip().splitlines()[-1]
        structlog.get_logger("embedd.api").log(record.levelno, message.strip()[:_MAX_MESSAGE], **more)
