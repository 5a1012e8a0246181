"""CDC streams: the run that reads a connection's log, its position, and the state of its tables.

A run *claims* a stream by compare-and-set; from then on it writes only while it owns the stream. The position kept here is
never behind the confirmed one, so a stream that somebody else has moved is noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from embedd_dagster.catalog import resyncs, vector_tables
from embedd_dagster.catalog.clock import database_now, now
from embedd_dagster.catalog.tables import (
    CdcState,
    CdcStreamRow,
    Connection,
    EmbeddingProvider,
    Task,
    VectorSetRow,
    VectorTable,
)
from embedd_dagster.core.cdc import TableState
from embedd_dagster.core.status import LIVE_TASK_STATUSES, TaskType
from embedd_dagster.core.vector_table import SyncMode
from embedd_dagster.errors import RunSuperseded

_FIRST_DELAY: Final = timedelta(seconds=5)
_LONGEST_DELAY: Final = timedelta(minutes=5)
_MOST_DOUBLINGS: Final = 10  # far beyond the longest delay; a timedelta has an end
_GOOD_RUN: Final = timedelta(minutes=5)
_LIVE: Final = tuple(status.value for status in LIVE_TASK_STATUSES)
_is_cdc = and_(VectorTable.sync_mode == SyncMode.CDC.value, VectorTable.deleted_at.is_(None))


def stream_name(connection_id: str) -> str:
    """The name of a connection's stream in the source."""
    return f"embedd_{connection_id.lower()}"


def claim(
    session: Session, connection_id: str, run_id: str, *, stale_after: timedelta, renew_after: timedelta
) -> CdcStreamRow:
    """Makes the run the owner of the connection's stream, which is created if it is new.

    Raises RunSuperseded while another run owns it, gives heartbeats and was claimed less than `renew_after` ago.
    """
    instant = database_now(session)
    stream = find(session, connection_id, lock=True)
    if stream is None:
        stream = CdcStreamRow(
            connection_id=connection_id, name=stream_name(connection_id), failures=0, created_at=instant
        )  # fmt: skip
        session.add(stream)
    elif stream.dagster_run_id not in (None, run_id) and stream.heartbeat_at and stream.claimed_at:
        silent = instant - stream.heartbeat_at > stale_after
        if not silent and instant - stream.claimed_at < renew_after:
            raise RunSuperseded(f"Run {stream.dagster_run_id} is already reading the changes of this connection.")
    stream.dagster_run_id = run_id
    stream.claimed_at = stream.heartbeat_at = instant
    resyncs.discard_buffered(session, connection_id)
    return stream


def find(session: Session, connection_id: str, *, lock: bool = False) -> CdcStreamRow | None:
    """The stream of a connection, or None."""
    return session.get(CdcStreamRow, connection_id, with_for_update=lock or None, populate_existing=lock)


def assert_owner(session: Session, connection_id: str, run_id: str) -> None:
    """Fences the present transaction: returns only while this run owns the stream. Raises RunSuperseded."""
    owned = session.scalar(
        select(CdcStreamRow.connection_id)
        .where(CdcStreamRow.connection_id == connection_id, CdcStreamRow.dagster_run_id == run_id)
        .with_for_update(read=True)
    )
    if owned is None:
        raise RunSuperseded(f"Run {run_id} no longer reads the changes of this connection.")


def heartbeat(session: Session, connection_id: str, run_id: str, lag_bytes: int | None, alarm: str | None) -> None:
    """Records that the run is alive, how much log the source keeps for it, and what is wrong. Raises RunSuperseded."""
    changed = session.execute(
        update(CdcStreamRow)
        .where(CdcStreamRow.connection_id == connection_id, CdcStreamRow.dagster_run_id == run_id)
        .values(
            heartbeat_at=func.clock_timestamp(),
            lag_bytes=func.coalesce(lag_bytes, CdcStreamRow.lag_bytes),
            last_error=alarm,
            last_error_at=None if alarm is None else func.clock_timestamp(),
        )
        .returning(CdcStreamRow.connection_id)
    ).one_or_none()
    if changed is None:
        raise RunSuperseded(f"Run {run_id} no longer reads the changes of this connection.")


def advance(
    session: Session, connection_id: str, *, position: str | None = None, caught_up_at: datetime | None = None
) -> None:
    """Records a position before it is confirmed, and when nothing was left to apply."""
    values = {"position": position, "caught_up_at": caught_up_at}
    session.execute(
        update(CdcStreamRow)
        .where(CdcStreamRow.connection_id == connection_id)
        .values({name: value for name, value in values.items() if value is not None})
    )


def end(session: Session, connection_id: str, run_id: str, error: str | None) -> None:
    """The run gives the stream up. After an error the next run waits, longer each time. Idempotent."""
    stream = find(session, connection_id, lock=True)
    if stream is None or stream.dagster_run_id != run_id:
        return
    instant = now()
    lasted = instant - (stream.claimed_at or instant)
    stream.dagster_run_id = stream.heartbeat_at = None
    resyncs.discard_buffered(session, connection_id)
    if error is None:
        stream.failures, stream.next_start_at = 0, None
        return
    stream.failures = 1 if lasted > _GOOD_RUN else stream.failures + 1
    stream.next_start_at = instant + min(_FIRST_DELAY * 2 ** min(stream.failures - 1, _MOST_DOUBLINGS), _LONGEST_DELAY)
    stream.last_error, stream.last_error_at = error, instant


def record_error(session: Session, connection_id: str, error: str) -> None:
    """Records what is wrong with a stream that no run owns."""
    session.execute(
        update(CdcStreamRow)
        .where(CdcStreamRow.connection_id == connection_id)
        .values(last_error=error, last_error_at=now())
    )


def fresh_as_of(table: VectorTable, stream: CdcStreamRow | None) -> datetime | None:
    """The latest instant at which the vector table is known to have been equal to its source."""
    state = table.cdc
    if (
        stream is None
        or stream.caught_up_at is None
        or state.subscribed_since is None
        or stream.caught_up_at <= state.subscribed_since
        or state.resync_requested_seq > state.resync_completed_seq
        or table.paused
    ):
        return table.last_sync_at
    return max(stream.caught_up_at, table.last_sync_at or stream.caught_up_at)


def remove(session: Session, connection_id: str) -> None:
    """Removes the record of a stream that the source no longer has. Idempotent."""
    session.execute(delete(CdcStreamRow).where(CdcStreamRow.connection_id == connection_id))


def all_streams(session: Session) -> list[CdcStreamRow]:
    """All streams."""
    return list(session.scalars(select(CdcStreamRow)))


def connections_with_cdc(session: Session) -> set[str]:
    """Connections with cdc tables that are not paused."""
    statement = select(VectorTable.connection_id).where(_is_cdc, ~VectorTable.paused).distinct()
    return set(session.scalars(statement))


@dataclass(frozen=True, slots=True)
class CdcTableRow:
    """A CDC table with its live set and its embedding provider."""

    table: VectorTable
    live_set: VectorSetRow | None
    provider: EmbeddingProvider | None


def cdc_tables(session: Session, connection_id: str) -> list[CdcTableRow]:
    """The vector tables of a connection that use CDC and are not paused."""
    statement = (
        select(VectorTable, VectorSetRow, EmbeddingProvider)
        .outerjoin(EmbeddingProvider, EmbeddingProvider.id == VectorTable.embedding_provider_id)
        .outerjoin(
            VectorSetRow,
            (VectorSetRow.vector_table_id == VectorTable.id) & (VectorSetRow.version == VectorTable.live_version),
        )
        .where(VectorTable.connection_id == connection_id, _is_cdc, ~VectorTable.paused)
    )
    return [CdcTableRow(*found) for found in session.execute(statement)]


def table_states(session: Session, vector_table_ids: Collection[str]) -> dict[str, TableState]:
    """The present state of these vector tables, without those that are deleted."""
    latest = (
        select(Task.id, Task.task_type, Task.status)
        .where(Task.target_id == VectorTable.id)
        .order_by(Task.status.in_(_LIVE).desc(), Task.created_at.desc(), Task.id.desc())
        .limit(1)
        .lateral()
    )
    statement = (
        select(
            VectorTable.id,
            VectorTable.live_version,
            VectorTable.paused,
            resyncs.is_pending & CdcState.buffered_by_run_id.is_(None),
            latest.c.id,
            latest.c.task_type,
            latest.c.status,
        )
        .join(CdcState, CdcState.vector_table_id == VectorTable.id)
        .outerjoin(latest, latest.c.id.is_not(None))
        .where(VectorTable.id.in_(vector_table_ids), VectorTable.deleted_at.is_(None))
    )
    return {
        key: TableState(
            live_version=live_version,
            paused=paused,
            resync_pending=owed,
            latest_task=task_id,
            live_task=TaskType(task_type) if status in _LIVE else None,
        )
        for key, live_version, paused, owed, task_id, task_type, status in session.execute(statement)
    }


def record_subscribed(
    session: Session, connection_id: str, fingerprints: Mapping[str, dict[str, Any]], newly_subscribed: Collection[str]
) -> list[str]:
    """Records which tables of the connection are read without a gap; returns those for which that begins now.

    These are the newly subscribed ones and those that were not recorded before. `fingerprints` are those of all subscribed
    tables, by vector table. Writes only what has changed. Idempotent.
    """
    ended = select(CdcState.vector_table_id).join(VectorTable, VectorTable.id == CdcState.vector_table_id)
    ended = ended.where(
        VectorTable.connection_id == connection_id,
        CdcState.subscribed_since.is_not(None),
        VectorTable.id.not_in(fingerprints),
    )
    ended_ids = list(session.scalars(ended))
    if ended_ids:
        resyncs.record_freshness(session, ended_ids)
        session.execute(
            update(CdcState)
            .where(CdcState.vector_table_id.in_(ended_ids))
            .values(subscribed_since=None, table_fingerprint=None)
        )
    begun = []
    states = select(CdcState).where(CdcState.vector_table_id.in_(fingerprints)).order_by(CdcState.vector_table_id)
    for state in session.scalars(states):
        key = state.vector_table_id
        if state.table_fingerprint != fingerprints[key]:
            state.table_fingerprint = fingerprints[key]
        if state.subscribed_since is None or key in newly_subscribed:
            state.subscribed_since = now()
            begun.append(key)
    return begun


def subscribed_among(session: Session, vector_table_ids: Collection[str]) -> list[str]:
    """Those of these vector tables that are recorded as subscribed."""
    statement = select(CdcState.vector_table_id).where(
        CdcState.vector_table_id.in_(vector_table_ids), CdcState.subscribed_since.is_not(None)
    )
    return list(session.scalars(statement))


def mark_stream_failed(session: Session, connection_id: str, error: str) -> None:
    """No table of the connection can be read until a person acts: all get the error, and are compared afterwards."""
    record_subscribed(session, connection_id, {}, [])
    for row in cdc_tables(session, connection_id):
        vector_tables.mark_failed(session, row.table.id, error)


def unused_streams(session: Session, connection_id: str | None = None) -> list[tuple[CdcStreamRow, Connection]]:
    """Streams (or that of one connection) that no table uses any more: what they created in the source has to be dropped."""
    used = select(VectorTable.id).where(
        VectorTable.connection_id == CdcStreamRow.connection_id, _is_cdc, ~VectorTable.paused
    )
    statement = select(CdcStreamRow, Connection).join(Connection).where(~used.exists())
    if connection_id is not None:
        statement = statement.where(CdcStreamRow.connection_id == connection_id)
    return [(stream, connection) for stream, connection in session.execute(statement)]
