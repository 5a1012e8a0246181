"""Following a connection's log: reads which keys changed, has them applied, and only then lets the source forget.

A change to a table that has vectors is applied, or noted until it can be, or a sync is owed that will find it;
whichever it is, is durable before the position is confirmed. So a follower may die anywhere: the next one is given the
same changes again, and applying them twice ends in the same points.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime
from typing import Final

from embedd_dagster.catalog import cdc, connections, resyncs, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.engine.cdc.lease import FeedLease, LogTooLong
from embedd_dagster.engine.cdc.report import FollowReport, Reports
from embedd_dagster.engine.cdc.table import Following
from embedd_dagster.engine.cdc.tables import CdcTables
from embedd_dagster.engine.opened import Opened
from embedd_dagster.engine.run import describe
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import (
    CatalogUnavailable,
    CdcPositionLost,
    EmbeddError,
    PermanentError,
    RunCancelled,
    RunSuperseded,
    SourceUnavailable,
    TransientError,
)
from embedd_dagster.protocols.cdc import CdcStream, Subscription

_KEYS_A_BATCH: Final = 1_000
_ATTACH_SECONDS: Final = 5.0
_CONFIRM_SECONDS: Final = 2.0
"""How long what is applied waits to be confirmed while there is more."""
_IDLE_CONFIRM_SECONDS: Final = 5.0
_CAUGHT_UP_SECONDS: Final = 1.0
_LONGEST_OUTAGE_WAIT_SECONDS: Final = 10.0
_HELD_OUT_SECONDS: Final = 60.0
"""How long a table may wait for somebody's transaction before its users are told."""


def follow(
    runtime: Runtime,
    connection_id: str,
    run_id: str,
    *,
    log: Callable[[str], None],
    report: Callable[[FollowReport], None],
    should_stop: Callable[[], bool],
) -> str:
    """Follows a connection until nothing is left to follow, another run takes over, or it is asked to end; says which.

    Raises what keeps it from following at all, after it has been recorded with the feed: the next run waits for a while.
    """
    try:
        lease = FeedLease(runtime, connection_id, run_id, log=log, should_stop=should_stop)
    except RunSuperseded as error:
        return str(error)
    trouble = None
    try:
        with closing(Follower(runtime, lease, log=log, report=report)) as follower:
            return follower.run()
    except (RunSuperseded, RunCancelled) as error:
        return str(error)
    except Exception as error:
        trouble = describe(error)
        if isinstance(error, PermanentError):
            with suppress(RunSuperseded, CatalogUnavailable), lease.fenced() as session:  # what is told is the error
                cdc.mark_stream_failed(session, connection_id, trouble)
        raise
    finally:
        lease.end(trouble)


class Follower:
    """One run's following of one connection."""

    def __init__(
        self,
        runtime: Runtime,
        lease: FeedLease,
        *,
        log: Callable[[str], None],
        report: Callable[[FollowReport], None],
    ) -> None:
        self._settings = runtime.settings
        self._lease = lease
        self._log = log
        with lease.transaction() as session:
            connection = connections.find(session, lease.connection_id)
        if connection is None:
            raise RunSuperseded("The connection is gone.")
        self._connection = connection
        self._opened = Opened(
            runtime,
            connection,
            check=lease.check,
            fenced=lease.fenced,
            log=log,
            patience_seconds=self._settings.follow_patience_seconds,
        )
        self._feed: CdcStream = self._opened.source.cdc_stream(lease.feed_name)
        self._reports = Reports(report)
        self._tables = CdcTables(Following(self._opened, lease.fenced, lease.check, log), lease, self._reports)
        self._position = lease.known_position
        self._held_out_since: dict[str, float] = {}
        """Tables that cannot join yet, and since when."""
        self._confirmed_at = self._caught_up_at = time.monotonic()

    def close(self) -> None:
        """Tells what is left to tell, and gives back what was opened; the source goes on keeping the position."""
        self._tables.close()
        with suppress(EmbeddError):  # numbers for people: not worth an end that looks like a failure
            self._reports.send_due(self._tables.by_id, self._lease, everything=True)
        self._feed.close()
        self._opened.close()

    def run(self) -> str:
        """Follows; why it has ended."""
        self._lease.begin(self._feed.lag)
        attached_at: float | None = None
        outage_wait = wait = 0.0
        while True:
            try:
                self._pause(wait)
                self._lease.check()
                if self._feed.is_altered or attached_at is None or time.monotonic() - attached_at > _ATTACH_SECONDS:
                    if reason := self._attach():
                        return reason
                    attached_at = time.monotonic()
                self._tables.apply_noted()  # first: nothing of it waits for what cannot be read yet
                self._read()
                self._reports.send_due(self._tables.by_id, self._lease)
            except CdcPositionLost as error:
                self._log(f"{error.message} Beginning anew.")
                attached_at, wait = None, 0.0
            except LogTooLong as error:
                self._give_up_log(error)
                attached_at, wait = None, 0.0
            except (SourceUnavailable, CatalogUnavailable) as error:
                # it comes back, or there is nothing to do for any run: meanwhile the source keeps its log
                outage_wait = min(max(0.5, outage_wait * 2), _LONGEST_OUTAGE_WAIT_SECONDS)
                self._lease.trouble = error.message
                self._log(f"{error.message} Trying again in {outage_wait:g} seconds.")
                attached_at, wait = None, outage_wait
            else:
                outage_wait, self._lease.trouble = 0.0, None
                wait = max(self._settings.follow_poll_seconds, self._tables.gathering_seconds)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._lease.check()
            time.sleep(min(left, 0.25))

    def _attach(self) -> str | None:
        """Sees to it that the tables of now are followed; a reason to end where there are none."""
        # fenced: to a run that was replaced unnoticed, its successor's slot looks like one that somebody has moved
        with self._lease.fenced() as session:
            connection = connections.find(session, self._lease.connection_id)
            rows = cdc.cdc_tables(session, self._lease.connection_id)
        if connection is None or connection.updated_at != self._connection.updated_at:
            if connection is not None and not self._feed.reads_log_of(connection.settings):
                self._leave_server()
            return "The connection was changed: another run goes on with it."
        self._tables.take_up(rows)
        if not rows:
            with self._lease.fenced() as session:
                cdc.record_subscribed(session, self._lease.connection_id, {}, [])
                self._feed.drop()
                cdc.remove(session, self._lease.connection_id)
            return "No table of this connection is to be followed any more."
        attachment = self._feed.subscribe(self._tables.sources, self._position, self._tables.shapes)
        for key in self._tables.ids(attachment.newly_subscribed):
            self._tables.by_id[key].forget_reader()
        self._record(attachment)
        return None

    def _leave_server(self) -> None:
        """Drops slot and publication of a server that the connection leads to no more: it would keep its log for ever."""
        try:
            self._feed.drop()
        except EmbeddError as error:
            self._log(f"{error.message} {self._feed.removal_advice}")

    def _record(self, attachment: Subscription) -> None:
        begins_anew = self._position is None or attachment.lost is not None
        joined = self._tables.ids(attachment.newly_subscribed)
        shapes = {
            key: shape for source, shape in attachment.table_fingerprints.items() for key in self._tables.ids([source])
        }
        refused = {key: error for source, error in attachment.rejected.items() for key in self._tables.ids([source])}
        instant = time.monotonic()
        held_out_since = {key: self._held_out_since.get(key, instant) for key in refused}
        with self._lease.fenced() as session:
            hidden = cdc.subscribed_among(session, self._tables.ids(attachment.hidden))
            anew = cdc.record_subscribed(session, self._lease.connection_id, shapes, joined)
            states = cdc.table_states(session, anew)
            # before it was ever built there is nothing to compare, unless that is being done at this moment
            owed = [key for key, state in states.items() if state.live_version is not None or state.live_task]
            resyncs.request(session, owed, attachment.lost or "Its changes were not followed before.")
            if attachment.lost:
                vector_tables.record_error(session, owed, attachment.lost)
            resyncs.request(session, hidden, "Row-level security hides rows of it since.")
            for key, error in refused.items():
                if not isinstance(error, TransientError):
                    vector_tables.mark_failed(session, key, describe(error))
                elif instant - held_out_since[key] > _HELD_OUT_SECONDS:  # else it is followed in a moment
                    vector_tables.record_error(session, [key], describe(error))
            if begins_anew:
                self._lease.advance(session, position=attachment.position)
        self._held_out_since = held_out_since
        if begins_anew:
            self._position = attachment.position
        if anew:
            self._log(f"{attachment.lost or ''} Following {', '.join(sorted(anew))} from now on.".strip())

    def _give_up_log(self, error: LogTooLong) -> None:
        self._log(f"{error.message} It is dropped, and everything is compared instead.")
        self._feed.drop()
        self._position = None
        with self._lease.fenced() as session:
            resyncs.request(session, self._tables.by_id, error.message)
            vector_tables.record_error(session, list(self._tables.by_id), error.message)
        self._lease.forgive()

    def _read(self) -> None:
        """Has all applied that was committed by now, then confirms it."""
        begun_at, position, changes = now(), None, 0
        with closing(self._feed.read(max_keys=_KEYS_A_BATCH)) as batches:
            for batch in batches:
                self._lease.check()
                changes += batch.change_count
                self._tables.apply(batch)
                if batch.position is not None:
                    position = batch.position
                    if time.monotonic() - self._confirmed_at > _CONFIRM_SECONDS:
                        self._confirm(position, None, changed=True)
        self._confirm(position, begun_at, changed=changes > 0)

    def _confirm(self, position: str | None, caught_up_at: datetime | None, *, changed: bool) -> None:
        instant = time.monotonic()
        # the log moves with every write to the server, ours among them: that alone is no reason to write again
        idle = not changed and instant - self._confirmed_at < _IDLE_CONFIRM_SECONDS
        if idle or position == self._position:
            position = None
        if not changed and instant - self._caught_up_at < _CAUGHT_UP_SECONDS:
            caught_up_at = None
        if position is None and caught_up_at is None:
            return
        with self._lease.fenced() as session:
            self._lease.advance(session, position=position, caught_up_at=caught_up_at)
        self._caught_up_at = self._caught_up_at if caught_up_at is None else instant
        if position is not None:
            self._position = position
            self._feed.confirm(position)
            self._confirmed_at = instant
