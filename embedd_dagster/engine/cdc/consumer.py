"""Consumes a connection's CDC stream: reads which keys changed, has them applied, and only then confirms the position.

A change to a table that has vectors is applied, or buffered until it can be, or a resync is requested that will find it.
Each of these is durable before the position is confirmed. So a consumer may die anywhere: the next one gets the same
changes again, and applying them twice ends in the same points.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from embedd_dagster.catalog import cdc, connections, resyncs, vector_tables
from embedd_dagster.catalog.clock import now
from embedd_dagster.engine.cdc.lease import CdcLease, LogTooLong
from embedd_dagster.engine.cdc.report import CdcReport, CdcReports
from embedd_dagster.engine.cdc.tables import CdcTables
from embedd_dagster.engine.context import RunContext
from embedd_dagster.engine.resources import ConnectionResources
from embedd_dagster.engine.retry import RetryPolicy
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

_KEYS_PER_BATCH: Final = 1_000
_CONFIRM_SECONDS: Final = 2.0
"""How long applied changes wait to be confirmed while there are more."""
_IDLE_CONFIRM_SECONDS: Final = 5.0
_CAUGHT_UP_SECONDS: Final = 1.0
_LONGEST_OUTAGE_WAIT_SECONDS: Final = 10.0


@dataclass(slots=True)
class ConsumerOptions:
    """How often a consumer looks; the defaults suit production."""

    subscribe_seconds: float = 5.0
    """How often it looks for tables that have come, gone or changed."""
    blocked_seconds: float = 60.0
    """How long a table may be blocked by somebody's transaction before its users see an error."""


def run_consumer(
    runtime: Runtime,
    connection_id: str,
    run_id: str,
    *,
    log: Callable[[str], None],
    report: Callable[[CdcReport], None],
    should_stop: Callable[[], bool],
    options: ConsumerOptions | None = None,
) -> str:
    """Consumes a connection's stream until no table is left, another run takes over, or it is asked to end; returns why.

    Raises an error that prevents consuming, after it is recorded with the stream: the next run starts after a delay.
    """
    try:
        lease = CdcLease(runtime, connection_id, run_id, log=log, should_stop=should_stop)
    except RunSuperseded as error:
        return str(error)
    trouble = None
    try:
        with closing(CdcConsumer(runtime, lease, log=log, report=report, options=options)) as consumer:
            return consumer.run()
    except (RunSuperseded, RunCancelled) as error:
        return str(error)
    except Exception as error:
        trouble = describe(error)
        if isinstance(error, PermanentError):
            with suppress(RunSuperseded, CatalogUnavailable), lease.fenced() as session:  # the first error is raised
                cdc.mark_stream_failed(session, connection_id, trouble)
        raise
    finally:
        lease.end(trouble)


class CdcConsumer:
    """One run that consumes the stream of one connection."""

    def __init__(
        self,
        runtime: Runtime,
        lease: CdcLease,
        *,
        log: Callable[[str], None],
        report: Callable[[CdcReport], None],
        options: ConsumerOptions | None = None,
    ) -> None:
        self._settings = runtime.settings
        self._options = options or ConsumerOptions()
        self._lease = lease
        self._log = log
        with runtime.catalog.transaction() as session:
            connection = connections.find(session, lease.connection_id)
        if connection is None:
            raise RunSuperseded("The connection is gone.")
        self._connection = connection
        outage_seconds = self._settings.follow_patience_seconds
        self._resources = ConnectionResources(runtime, connection, outage_seconds=outage_seconds, check=lease.check)
        context = RunContext(lease, self._resources, RetryPolicy(outage_seconds, lease.check, log), log)
        self._stream: CdcStream = self._resources.source.cdc_stream(lease.stream_name)
        self._reports = CdcReports(report)
        self._tables = CdcTables(runtime, context, lease, self._reports)
        self._position = lease.known_position
        self._blocked_since: dict[str, float] = {}
        """Tables that cannot be subscribed yet, and since when."""
        self._confirmed_at = self._caught_up_at = time.monotonic()

    def close(self) -> None:
        """Sends the last reports and closes what was opened; the source keeps its log from the confirmed position."""
        self._tables.close()
        with suppress(EmbeddError):  # reports are for users: not worth an end that looks like a failure
            self._reports.send_due(self._tables.by_id, self._lease, everything=True)
        self._stream.close()
        self._resources.close()

    def run(self) -> str:
        """Consumes until there is a reason to end, which it returns."""
        self._lease.begin(self._stream.lag)
        subscribed_at: float | None = None
        outage_wait = wait = 0.0
        while True:
            try:
                self._pause(wait)
                self._lease.check()
                due_at = None if subscribed_at is None else subscribed_at + self._options.subscribe_seconds
                if self._stream.is_altered or due_at is None or time.monotonic() > due_at:
                    if reason := self._subscribe():
                        return reason
                    subscribed_at = time.monotonic()
                self._tables.apply_buffered()  # first: it does not depend on what cannot be read yet
                self._read()
                self._reports.send_due(self._tables.by_id, self._lease)
            except CdcPositionLost as error:
                self._log(f"{error.message} Beginning at the current position.")
                subscribed_at, wait = None, 0.0
            except LogTooLong as error:
                self._drop_log(error)
                subscribed_at, wait = None, 0.0
            except (SourceUnavailable, CatalogUnavailable) as error:
                # no other run could do better: this one waits, and the source keeps its log
                outage_wait = min(max(0.5, outage_wait * 2), _LONGEST_OUTAGE_WAIT_SECONDS)
                self._lease.trouble = error.message
                self._log(f"{error.message} Trying again in {outage_wait:g} seconds.")
                subscribed_at, wait = None, outage_wait
            else:
                outage_wait, self._lease.trouble = 0.0, None
                wait = max(self._settings.follow_poll_seconds, self._tables.interval_seconds)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._lease.check()
            time.sleep(min(left, 0.25))

    def _subscribe(self) -> str | None:
        """Subscribes the tables that should be consumed now; returns a reason to end if there are none."""
        # fenced: to a replaced run that does not know it yet, its successor's position would look moved by somebody
        with self._lease.fenced() as session:
            connection = connections.find(session, self._lease.connection_id)
            rows = cdc.cdc_tables(session, self._lease.connection_id)
        if connection is None or connection.updated_at != self._connection.updated_at:
            if connection is not None and not self._stream.reads_log_of(connection.settings):
                self._leave_server()
            return "The connection was changed: another run continues with it."
        self._tables.replace(rows)
        if not rows:
            with self._lease.fenced() as session:
                cdc.record_subscribed(session, self._lease.connection_id, {}, [])
                self._stream.drop()
                cdc.remove(session, self._lease.connection_id)
            return "No table of this connection uses CDC any more."
        subscription = self._stream.subscribe(self._tables.sources, self._position, self._tables.fingerprints)
        for key in self._tables.ids(subscription.newly_subscribed):
            self._tables.by_id[key].reopen_reader()
        self._record(subscription)
        return None

    def _leave_server(self) -> None:
        """Drops the stream on the server that the connection led to before: it would keep its log for ever."""
        try:
            self._stream.drop()
        except EmbeddError as error:
            self._log(f"{error.message} {self._stream.removal_advice}")

    def _record(self, subscription: Subscription) -> None:
        restarted = self._position is None or subscription.lost is not None
        newly_subscribed = self._tables.ids(subscription.newly_subscribed)
        fingerprints = {
            key: fingerprint
            for source, fingerprint in subscription.table_fingerprints.items()
            for key in self._tables.ids([source])
        }
        rejected = {key: error for source, error in subscription.rejected.items() for key in self._tables.ids([source])}
        instant = time.monotonic()
        blocked_since = {key: self._blocked_since.get(key, instant) for key in rejected}
        with self._lease.fenced() as session:
            hidden = cdc.subscribed_among(session, self._tables.ids(subscription.hidden))
            subscribed = cdc.record_subscribed(session, self._lease.connection_id, fingerprints, newly_subscribed)
            states = cdc.table_states(session, subscribed)
            # a table that was never built has nothing to compare, unless it is being built at this moment
            to_resync = [key for key, state in states.items() if state.live_version is not None or state.live_task]
            resyncs.request(session, to_resync, subscription.lost or "Its changes were not followed before.")
            if subscription.lost:
                vector_tables.record_error(session, to_resync, subscription.lost)
            resyncs.request(session, hidden, "Row-level security hides rows of it since.")
            for key, error in rejected.items():
                if not isinstance(error, TransientError):
                    vector_tables.mark_failed(session, key, describe(error))
                elif instant - blocked_since[key] > self._options.blocked_seconds:
                    vector_tables.record_error(session, [key], describe(error))
            if restarted:
                self._lease.advance(session, position=subscription.position)
        self._blocked_since = blocked_since
        if restarted:
            self._position = subscription.position
        if subscribed:
            self._log(f"{subscription.lost or ''} Following {', '.join(sorted(subscribed))} from now on.".strip())

    def _drop_log(self, error: LogTooLong) -> None:
        self._log(f"{error.message} It is dropped, and syncs compare all tables instead.")
        self._stream.drop()
        self._position = None
        with self._lease.fenced() as session:
            resyncs.request(session, self._tables.by_id, error.message)
            vector_tables.record_error(session, list(self._tables.by_id), error.message)
        self._lease.resume()

    def _read(self) -> None:
        """Applies everything that is committed so far, then confirms it."""
        begun_at, position, changes = now(), None, 0
        with closing(self._stream.read(max_keys=_KEYS_PER_BATCH)) as batches:
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
        # every write to the server moves the log, also our own: that alone is not a reason to write again
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
            self._stream.confirm(position)
            self._confirmed_at = instant
