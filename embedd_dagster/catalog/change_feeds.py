"""Change feeds: which run follows a connection's log, how far it is, and what its tables are at this moment.

A run *claims* a feed by compare-and-set; from then on it writes only while it owns it. The position kept here is never
behind the one that the source was told: so a feed that somebody else moved is noticed.
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
from embedd_dagster.catalog.tables import ChangeFeed, Connection, EmbeddingProvider, Task, VectorSetRow, VectorTable
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


def feed_name(connection_id: str) -> str:
    """What a connection's feed is called in the source."""
    return f"embedd_{connection_id.lower()}"


def claim(
    session: Session, connection_id: str, run_id: str, *, stale_after: timedelta, renew_after: timedelta
) -> ChangeFeed:
    """Makes the run the owner of the connection's feed, which is recorded if it is new.

    Raises RunSuperseded while another run is at it that gives heartbeats and is not to be renewed.
    """
    instant = database_now(session)
    feed = find(session, connection_id, lock=True)
    if feed is None:
        feed = ChangeFeed(
            connection_id=connection_id, name=feed_name(connection_id), failures=0, created_at=instant
        )  # fmt: skip
        session.add(feed)
    elif feed.dagster_run_id not in (None, run_id) and feed.heartbeat_at and feed.claimed_at:
        silent = instant - feed.heartbeat_at > stale_after
        if not silent and instant - feed.claimed_at < renew_after:
            raise RunSuperseded(f"Run {feed.dagster_run_id} follows this connection already.")
    feed.dagster_run_id = run_id
    feed.claimed_at = feed.heartbeat_at = instant
    resyncs.release(session, connection_id)
    return feed


def find(session: Session, connection_id: str, *, lock: bool = False) -> ChangeFeed | None:
    """The feed of a connection, or None."""
    return session.get(ChangeFeed, connection_id, with_for_update=lock or None, populate_existing=lock)


def assert_owner(session: Session, connection_id: str, run_id: str) -> None:
    """Fences the present transaction: returns only while this run owns the feed. Raises RunSuperseded."""
    owned = session.scalar(
        select(ChangeFeed.connection_id)
        .where(ChangeFeed.connection_id == connection_id, ChangeFeed.dagster_run_id == run_id)
        .with_for_update(read=True)
    )
    if owned is None:
        raise RunSuperseded(f"Run {run_id} does not follow this connection any more.")


def heartbeat(session: Session, connection_id: str, run_id: str, lag_bytes: int | None, alarm: str | None) -> None:
    """Says that the run is alive, how much log the source keeps for it, and what is wrong. Raises RunSuperseded."""
    changed = session.execute(
        update(ChangeFeed)
        .where(ChangeFeed.connection_id == connection_id, ChangeFeed.dagster_run_id == run_id)
        .values(
            heartbeat_at=func.clock_timestamp(),
            lag_bytes=func.coalesce(lag_bytes, ChangeFeed.lag_bytes),
            last_error=alarm,
            last_error_at=None if alarm is None else func.clock_timestamp(),
        )
        .returning(ChangeFeed.connection_id)
    ).one_or_none()
    if changed is None:
        raise RunSuperseded(f"Run {run_id} does not follow this connection any more.")


def advance(
    session: Session, connection_id: str, *, position: int | None = None, caught_up_at: datetime | None = None
) -> None:
    """Records a position before the source is told, and when nothing was left to apply."""
    values = {"position": position, "caught_up_at": caught_up_at}
    session.execute(
        update(ChangeFeed)
        .where(ChangeFeed.connection_id == connection_id)
        .values({name: value for name, value in values.items() if value is not None})
    )


def end(session: Session, connection_id: str, run_id: str, error: str | None) -> None:
    """The run follows no longer; after a bad end the next one waits, the longer the more of them there were. Idempotent."""
    feed = find(session, connection_id, lock=True)
    if feed is None or feed.dagster_run_id != run_id:
        return
    instant = now()
    lasted = instant - (feed.claimed_at or instant)
    feed.dagster_run_id = feed.heartbeat_at = None
    resyncs.release(session, connection_id)
    if error is None:
        feed.failures, feed.next_start_at = 0, None
        return
    feed.failures = 1 if lasted > _GOOD_RUN else feed.failures + 1
    feed.next_start_at = instant + min(_FIRST_DELAY * 2 ** min(feed.failures - 1, _MOST_DOUBLINGS), _LONGEST_DELAY)
    feed.last_error, feed.last_error_at = error, instant


def note_error(session: Session, connection_id: str, error: str) -> None:
    """Tells what is wrong with a feed that no run is at."""
    session.execute(
        update(ChangeFeed)
        .where(ChangeFeed.connection_id == connection_id)
        .values(last_error=error, last_error_at=now())
    )


def true_until(table: VectorTable, feed: ChangeFeed | None) -> datetime | None:
    """The latest instant at which the vector table is known to have been equal to its source."""
    followed = (
        feed is not None
        and feed.caught_up_at is not None
        and table.followed_since is not None
        and feed.caught_up_at > table.followed_since
        and table.resync_wanted == table.resync_done
        and not table.paused
    )
    if not followed or feed is None or feed.caught_up_at is None:
        return table.last_sync_at
    return max(feed.caught_up_at, table.last_sync_at or feed.caught_up_at)


def remove(session: Session, connection_id: str) -> None:
    """Forgets a feed of which nothing is left in the source. Idempotent."""
    session.execute(delete(ChangeFeed).where(ChangeFeed.connection_id == connection_id))


def all_feeds(session: Session) -> list[ChangeFeed]:
    """Every feed there is."""
    return list(session.scalars(select(ChangeFeed)))


def connections_to_follow(session: Session) -> set[str]:
    """Connections with cdc tables that are not paused."""
    statement = select(VectorTable.connection_id).where(_is_cdc, ~VectorTable.paused).distinct()
    return set(session.scalars(statement))


@dataclass(frozen=True, slots=True)
class FollowedRow:
    """A cdc table, the set that is live, and its provider."""

    table: VectorTable
    live_set: VectorSetRow | None
    provider: EmbeddingProvider | None


def followed(session: Session, connection_id: str) -> list[FollowedRow]:
    """The cdc tables of a connection that are not paused."""
    statement = (
        select(VectorTable, VectorSetRow, EmbeddingProvider)
        .outerjoin(EmbeddingProvider, EmbeddingProvider.id == VectorTable.embedding_provider_id)
        .outerjoin(
            VectorSetRow,
            (VectorSetRow.vector_table_id == VectorTable.id) & (VectorSetRow.version == VectorTable.live_version),
        )
        .where(VectorTable.connection_id == connection_id, _is_cdc, ~VectorTable.paused)
    )
    return [FollowedRow(*found) for found in session.execute(statement)]


def states(session: Session, vector_table_ids: Collection[str]) -> dict[str, TableState]:
    """What these vector tables are at this moment; those that are gone are left out."""
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
            resyncs.is_owed & VectorTable.resync_held_by.is_(None),
            latest.c.id,
            latest.c.task_type,
            latest.c.status,
        )
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


def set_followed(
    session: Session, connection_id: str, shapes: Mapping[str, dict[str, Any]], joined: Collection[str]
) -> list[str]:
    """Records which tables of the connection are followed without a gap; gives those for which that begins only now.

    Those that have joined, and those that were not followed before, whatever was published of them meanwhile. `shapes`: of
    all that are followed. Writes only what has changed.
    """
    gone = select(VectorTable.id).where(
        VectorTable.connection_id == connection_id,
        VectorTable.followed_since.is_not(None),
        VectorTable.id.not_in(shapes),
    )
    gone_ids = list(session.scalars(gone))
    if gone_ids:
        resyncs.keep_freshness(session, gone_ids)
        session.execute(
            update(VectorTable).where(VectorTable.id.in_(gone_ids)).values(followed_since=None, followed_shape=None)
        )
    anew = []
    for table in session.scalars(select(VectorTable).where(VectorTable.id.in_(shapes)).order_by(VectorTable.id)):
        if table.followed_shape != shapes[table.id]:
            table.followed_shape = shapes[table.id]
        if table.followed_since is None or table.id in joined:
            table.followed_since = now()
            anew.append(table.id)
    return anew


def followed_among(session: Session, vector_table_ids: Collection[str]) -> list[str]:
    """Those of these vector tables that are recorded as followed."""
    statement = select(VectorTable.id).where(
        VectorTable.id.in_(vector_table_ids), VectorTable.followed_since.is_not(None)
    )
    return list(session.scalars(statement))


def stop_following(session: Session, connection_id: str, error: str) -> None:
    """None of the connection's tables can be followed until somebody acts: they say so, and are compared afterwards."""
    set_followed(session, connection_id, {}, [])
    for row in followed(session, connection_id):
        vector_tables.refuse(session, row.table.id, error)


def unused(session: Session, connection_id: str | None = None) -> list[tuple[ChangeFeed, Connection]]:
    """Feeds (or that of one connection) that no table is followed by any more: what they made in the source is to go."""
    used = select(VectorTable.id).where(
        VectorTable.connection_id == ChangeFeed.connection_id, _is_cdc, ~VectorTable.paused
    )
    statement = select(ChangeFeed, Connection).join(Connection).where(~used.exists())
    if connection_id is not None:
        statement = statement.where(ChangeFeed.connection_id == connection_id)
    return [(feed, connection) for feed, connection in session.execute(statement)]
