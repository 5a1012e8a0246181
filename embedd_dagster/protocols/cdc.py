"""What a source must be able to do for CDC: report, from its log, which keys of which tables have changed.

An event only names keys. The rows are read again from the source, so duplicates and reordering do no harm. A CDC stream is
one position in the log of one database, with the tables that are read from it. `Source.cdc_stream` opens it, and one thread
at a time uses it. It raises what a source raises, and CdcPositionLost.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self

from embedd_dagster.core.keys import Key
from embedd_dagster.errors import EmbeddError

TableFingerprint = dict[str, Any]
"""What a table looks like apart from its rows, as JSON: reveals changes that no event reports. Only the stream reads it."""


@dataclass(frozen=True, slots=True)
class CdcTable:
    """A source table as a vector table names it, and the column whose values the events name."""

    table: str
    primary_key_column: str


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a stream is behind its source, in the connector's unit, such as `bytes` of log or `seconds`."""

    amount: int
    unit: str


@dataclass(frozen=True, slots=True)
class Subscription:
    """The state of a stream after `subscribe`."""

    position: str
    """`read` gives everything that was committed after this position. Only the connector reads the text."""
    newly_subscribed: frozenset[CdcTable]
    """Tables whose earlier changes may have been missed. Empty if nothing was missed."""
    table_fingerprints: Mapping[CdcTable, TableFingerprint]
    """The subscribed tables as they are now. Store them once the newly subscribed ones are sure to be compared."""
    rejected: Mapping[CdcTable, EmbeddError]
    """Tables that cannot be subscribed, each with what to do about it. The others are subscribed all the same."""
    hidden: frozenset[CdcTable] = frozenset()
    """Rejected tables of which only some rows are visible. Compare them, so that points of hidden rows are removed."""
    lost: str | None = None
    """Why the stream could not continue from the known position, as a sentence for users. None if it could."""


@dataclass(slots=True)
class ChangeBatch:
    """Some changes, in the order of their commits."""

    keys: dict[CdcTable, list[Key]] = field(default_factory=dict)
    """Keys whose rows must be read again, each once per batch: inserted, updated, deleted, and both of a changed key."""
    truncated: set[CdcTable] = field(default_factory=set)
    """Tables that were truncated. Keys of them in this batch may be from before or after that."""
    broken: dict[CdcTable, EmbeddError] = field(default_factory=dict)
    """Tables with an event that cannot be decoded, for example because the key column is gone. Compare them."""
    change_count: int = 0
    committed_at: datetime | None = None
    """When the oldest transaction in the batch was committed, by the source's clock."""
    position: str | None = None
    """What may be confirmed once this batch and all before it are applied. None in the middle of a transaction."""
    transactions: set[int] = field(default_factory=set)
    """The source's own numbers of the transactions that made the changes. Only the stream reads them."""


class CdcStream(Protocol):
    """One position in a source's log. Used by one thread at a time, except `lag`, which any thread may call."""

    def subscribe(
        self,
        tables: Sequence[CdcTable],
        known_position: str | None,
        known_fingerprints: Mapping[CdcTable, TableFingerprint | None],
    ) -> Subscription:
        """Makes the source keep its log for exactly these tables, from a position on.

        Idempotent and cheap: call it repeatedly to notice what others have changed. A table whose fingerprint differs is
        newly subscribed. A stream that is gone, or that was moved beyond `known_position`, starts again and reports it.

        Args:
            tables: All tables to read from the log.
            known_position: The position that was last passed to `confirm`; None if there is none.
            known_fingerprints: The stored fingerprints of the tables that were subscribed until now; a value of None
                stands for a subscribed table without a stored fingerprint.

        Raises:
            SourceRejected: CDC is not possible for the database as a whole. The resolution holds the statements to run.
        """
        ...

    def read(self, *, max_keys: int) -> Generator[ChangeBatch, None, None]:
        """What was committed after the confirmed position, in batches of about `max_keys` keys at most.

        Ends with what was committed when the call was made; the last batch has a position, and may have no keys. A
        transaction of any size takes bounded memory, as it comes in several batches. A batch is given once every statement
        that begins afterwards sees all of its rows.

        Raises:
            SourceUnavailable: The source does not answer, or its rows do not become visible in time.
            CdcPositionLost: The source no longer keeps its log from the position on. `subscribe` starts again.
        """
        ...

    def confirm(self, position: str) -> None:
        """Lets the source discard its log up to this position. Idempotent."""
        ...

    @property
    def is_altered(self) -> bool:
        """Whether the last `read` found that a subscribed table was altered. Call `subscribe` at once if so."""
        ...

    def lag(self) -> Lag | None:
        """How much of its log the source keeps for this stream. None if it keeps none."""
        ...

    def reads_log_of(self, credentials: Mapping[str, Any]) -> bool:
        """Whether these credentials lead to the database whose log this stream reads. Secrets may be left out."""
        ...

    @property
    def removal_advice(self) -> str:
        """A sentence that says how an administrator removes what the stream created, if `drop` cannot."""
        ...

    def drop(self) -> None:
        """Removes everything that the stream has created in the source. Idempotent."""
        ...

    def close(self) -> None:
        """Closes connections. The source continues to keep its log from the position on. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
