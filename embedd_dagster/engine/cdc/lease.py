"""A follower's ownership of its connection's feed: the claim, the heartbeat, the fence, and the alarm of a log that grows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from embedd_dagster.catalog import cdc
from embedd_dagster.deadlines import deadline
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError, RunCancelled, RunSuperseded, TransientError
from embedd_dagster.protocols.cdc import Lag


class LogTooLong(EmbeddError):
    """The source keeps more of its log for us than the installation allows."""


class FeedLease:
    """One run's claim on a feed. Every catalog write goes through `fenced`, every wait through `check`."""

    def __init__(
        self,
        runtime: Runtime,
        connection_id: str,
        run_id: str,
        *,
        log: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Claims the feed. Raises RunSuperseded while another run follows it."""
        self._runtime = runtime
        self._settings = runtime.settings
        self.connection_id = connection_id
        self.run_id = run_id
        self._log = log
        self._should_stop = should_stop
        self._ended = threading.Event()
        self._stopped_by: BaseException | None = None
        self._lag: Callable[[], Lag | None] = lambda: None
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.lag_bytes: int | None = None
        self.trouble: str | None = None
        """What keeps the follower from following at this moment, for users; set by whoever is in trouble."""
        with runtime.catalog.transaction() as session:
            feed = cdc.claim(
                session,
                connection_id,
                run_id,
                stale_after=timedelta(seconds=self._settings.stale_after_seconds),
                renew_after=timedelta(seconds=self._settings.follow_renew_seconds),
            )
        self.feed_name = feed.name
        self.known_position = feed.position

    def begin(self, lag: Callable[[], Lag | None]) -> None:
        """Begins to give heartbeats, and to look how much log the source keeps."""
        self._lag = lag
        self._heart.start()

    def end(self, error: str | None) -> None:
        """Gives the feed up, if it is still this run's; `error` is what went wrong, for users."""
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join()
        try:
            with self._runtime.catalog.transaction() as session:
                cdc.end(session, self.connection_id, self.run_id, error)
        except TransientError as unavailable:
            self._log(f"The feed is not given up: {unavailable}")  # its silence will tell

    def check(self) -> None:
        """Returns while the run may go on. Raises RunSuperseded, RunCancelled, LogTooLong."""
        if self._stopped_by is not None:
            raise self._stopped_by
        if self._should_stop():
            raise RunCancelled("The run was asked to end.")

    def forgive(self) -> None:
        """The log that was too long has been dropped."""
        if isinstance(self._stopped_by, LogTooLong):
            self._stopped_by = None

    def transaction(self) -> AbstractContextManager[Session]:
        """A catalog transaction that reads."""
        return self._runtime.catalog.transaction()

    def advance(self, session: Session, *, position: str | None, caught_up_at: datetime | None = None) -> None:
        """Records a position before the source is told, and when nothing was left to apply."""
        cdc.advance(session, self.connection_id, position=position, caught_up_at=caught_up_at)

    @contextmanager
    def fenced(self) -> Iterator[Session]:
        """A catalog transaction that commits only while this run owns the feed."""
        with self._runtime.catalog.transaction() as session:
            cdc.assert_owner(session, self.connection_id, self.run_id)
            yield session

    def _beat(self) -> None:
        while not self._ended.wait(self._settings.heartbeat_seconds):
            alarm = self._look_at_lag()
            try:
                with self._runtime.catalog.transaction() as session:
                    cdc.heartbeat(session, self.connection_id, self.run_id, self.lag_bytes, alarm)
            except RunSuperseded as error:
                self._stopped_by = error
                return
            except TransientError as error:
                self._log(f"Heartbeat not written: {error}")  # the next one may be; too long a silence ends the run

    def _look_at_lag(self) -> str | None:
        """What is wrong at this moment, if anything."""
        try:
            with deadline(self._settings.heartbeat_seconds):  # a source that hangs must not keep the heartbeat back
                lag = self._lag()
        except EmbeddError as error:
            return self.trouble or error.message
        self.lag_bytes = lag.amount if lag is not None and lag.unit == "bytes" else None
        limit = self._settings.cdc_max_lag_bytes
        if not limit or self.lag_bytes is None or self.lag_bytes <= limit:
            return self.trouble
        alarm = f"The source keeps {self.lag_bytes} bytes of its log for {self.feed_name}, more than {limit}."
        if self._settings.cdc_drop_above_max_lag and self._stopped_by is None:
            self._stopped_by = LogTooLong(alarm)
        return alarm
