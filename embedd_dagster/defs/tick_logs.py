"""The logs of ticks: Dagster keeps each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import dagster as dg
from dagster._core.storage.compute_log_manager import ComputeIOType


def tick_log(context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext) -> Callable[[str], None]:
    """Writes to the tick's log. The file of a tick comes with its first line: most ticks have nothing to say.

    To touch `context.log` makes the file, and sensors tick some 50,000 times a day.
    """

    def log(line: str) -> None:
        context.log.info(line)

    return log


def purge_tick_logs(instance: dg.DagsterInstance, is_out_of_time: Callable[[], bool]) -> int:
    """Deletes the files of ticks that Dagster has forgotten; it deletes the ticks alone. How many."""
    manager = instance.compute_log_manager
    deleted = 0
    for state in instance.all_instigator_state():
        prefix = [state.origin.repository_origin.repository_name, state.instigator_name]
        found: list[list[str]] = []
        with suppress(FileNotFoundError):  # of one that has never logged anything
            # before the ticks are read: what is not among them is old, and not one that has just begun
            found = [list(key) for key in manager.get_log_keys_for_log_key_prefix(prefix, ComputeIOType.STDERR)]
        kept = {str(tick.tick_id) for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)}
        for log_key in found:
            if is_out_of_time():
                return deleted
            if log_key[-1] not in kept:
                manager.delete_logs(log_key=log_key)
                deleted += 1
    return deleted
