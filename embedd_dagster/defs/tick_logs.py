"""The logs of ticks: Dagster keeps each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg


def tick_log(context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext) -> Callable[[str], None]:
    """Writes to the tick's log. The file of a tick comes with its first line: most ticks have nothing to say.

    To touch `context.log` makes the file, and sensors tick some 50,000 times a day.
    """

    def log(line: str) -> None:
        context.log.info(line)

    return log
