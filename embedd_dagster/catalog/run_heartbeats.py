"""Heartbeats of runs: that a process is alive is known also while its run owns no task."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from embedd_dagster.catalog.tables import RunHeartbeat

_RUNS_PER_QUERY = 1000


def beat(session: Session, run_id: str) -> None:
    """Says that the run's process is alive."""
    now = func.clock_timestamp()
    statement = insert(RunHeartbeat).values(run_id=run_id, heartbeat_at=now)
    session.execute(statement.on_conflict_do_update(index_elements=[RunHeartbeat.run_id], set_={"heartbeat_at": now}))


def latest(session: Session, run_ids: Sequence[str]) -> dict[str, datetime]:
    """The last heartbeat of each of these runs that has given one."""
    found: dict[str, datetime] = {}
    for start in range(0, len(run_ids), _RUNS_PER_QUERY):
        some = run_ids[start : start + _RUNS_PER_QUERY]
        rows = session.execute(
            select(RunHeartbeat.run_id, RunHeartbeat.heartbeat_at).where(RunHeartbeat.run_id.in_(some))
        )
        found.update((run_id, heartbeat_at) for run_id, heartbeat_at in rows)
    return found


def forget(session: Session, before: datetime) -> None:
    """Removes the heartbeats of runs that have given none since."""
    session.execute(delete(RunHeartbeat).where(RunHeartbeat.heartbeat_at < before))
