"""Follows one connection in a process of its own and kills it (SIGKILL) at a named point: as `run_and_die`, of a follower.

Called with the settings in the environment: `follow_and_die.py CONNECTION_ID RUN_ID POINT NTH`.
"""

from __future__ import annotations

import sys
from typing import Any

from embedd_dagster.catalog import cdc, resyncs
from embedd_dagster.connectors.postgresql.cdc.stream import PostgresCdcStream
from embedd_dagster.engine.cdc.consumer import run_consumer
from embedd_dagster.engine.cdc.table import TableConsumer
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import read_settings
from tests.support.run_and_die import POINTS as OF_A_RUN
from tests.support.run_and_die import die_at

POINTS: dict[str, list[tuple[Any, str]]] = {
    "subscribe": [(PostgresCdcStream, "subscribe")],
    "record": [(cdc, "record_subscribed")],
    "read": [(PostgresCdcStream, "read")],
    "write": [(TableConsumer, "write")],
    "embed": OF_A_RUN["embed"],
    "upsert": OF_A_RUN["upsert"],
    "owe": [(resyncs, "request")],
    "advance": [(cdc, "advance")],
    "confirm": [(PostgresCdcStream, "confirm")],
}


def main() -> None:
    connection_id, run_id, point, nth = sys.argv[1:]
    when, _, name = point.partition(":")
    for owner, attribute in POINTS[name]:
        die_at(owner, attribute, when, int(nth))
    with Runtime.open(read_settings()) as runtime:
        run_consumer(
            runtime,
            connection_id,
            run_id,
            log=lambda _message: None,
            report=lambda _report: None,
            should_stop=lambda: False,
        )


if __name__ == "__main__":
    main()
