"""A CDC consumer's lease of its connection's stream, and the alarm about a source's log that grows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from embedd_dagster.catalog import cdc
from embedd_dagster.deadlines import deadline
from embedd_dagster.engine.lease import HeartbeatLease
from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.errors import EmbeddError, TransientError
from embedd_dagster.protocols.cdc import Lag


class LogTooLong(EmbeddError):
    """The source keeps more of its log for this stream than the installation allows."""


class CdcLease(HeartbeatLease):
    """One run's claim on a CDC stream. Every catalog write goes through `fenced`, every wait through `check`."""

    def __init__(
        self,
        runtime: Runtime,
        connection_id: str,
        run_id: str,
        *,
        log: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Claims the stream. Raises RunSuperseded while another run consumes it."""
        self._settings = runtime.settings
        super().__init__(
            runtime.catalog, heartbeat_seconds=self._settings.heartbeat_seconds, log=log, should_stop=should_stop
        )
        self.connection_id = connection_id
        self.run_id = run_id
        self._read_lag: Callable[[], Lag | None] = lambda: None
        self.lag_bytes: int | None = None
        self.trouble: str | None = None
        """What keeps the consumer from reading at the moment, for users; set by the consumer."""
        with runtime.catalog.transaction() as session:
            stream = cdc.claim(
                session,
                connection_id,
                run_id,
                stale_after=timedelta(seconds=self._settings.stale_after_seconds),
                renew_after=timedelta(seconds=self._settings.follow_renew_seconds),
            )
        self.stream_name = stream.name
        self.known_position = stream.position

    def begin(self, read_lag: Callable[[], Lag | None]) -> None:
        """Begins to renew the lease, and to watch how much log the source keeps."""
        self._read_lag = read_lag
        self.start()

    def end(self, error: str | None) -> None:
        """Gives the stream up, if it is still this run's; `error` is what went wrong, for users."""
        self.stop()
        try:
            with self._catalog.transaction() as session:
                cdc.end(session, self.connection_id, self.run_id, error)
        except TransientError as unavailable:
            self._log(f"The stream is not given up: {unavailable}")  # the next run waits until the heartbeat is stale

    def resume(self) -> None:
        """Lets the run go on after the log that was too long has been dropped."""
        if isinstance(self._stopped_by, LogTooLong):
            self._stopped_by = None

    def advance(self, session: Session, *, position: str | None, caught_up_at: datetime | None = None) -> None:
        """Records a position before it is confirmed to the source, and when nothing was left to apply."""
        cdc.advance(session, self.connection_id, position=position, caught_up_at=caught_up_at)

    def _assert_owner(self, session: Session) -> None:
        cdc.assert_owner(session, self.connection_id, self.run_id)

    def _renew(self) -> None:
        alarm = self._check_lag()
        with self._catalog.transaction() as session:
            cdc.heartbeat(session, self.connection_id, self.run_id, self.lag_bytes, alarm)

    def _check_lag(self) -> str | None:
        """What is wrong at this moment, if anything."""
        try:
            with deadline(self._settings.heartbeat_seconds):  # a source that hangs must not delay the heartbeat
                lag = self._read_lag()
        except EmbeddError as error:
            return self.trouble or error.message
        self.lag_bytes = lag.amount if lag is not None and lag.unit == "bytes" else None
        limit = self._settings.cdc_max_lag_bytes
        if not limit or self.lag_bytes is None or self.lag_bytes <= limit:
            return self.trouble
        alarm = f"The source keeps {self.lag_bytes} bytes of its log for {self.stream_name}, more than {limit}."
        if self._settings.cdc_drop_above_max_lag and self._stopped_by is None:
            self._stopped_by = LogTooLong(alarm)
        return alarm
