"""What a source that can be followed must do: say, from its log, which keys of which tables have changed.

An event only names keys: the rows are read again from the source, so that duplicates and order cannot corrupt. A feed is
one position in the log of one database, with the tables that are followed from it; it is opened by
`Source.change_feed` and used by one thread at a time. It raises what a source raises, and CdcPositionLost.
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
"""What a table is like, apart from its rows, as JSON: by it a feed sees what no event has told. Only for the feed to read."""


@dataclass(frozen=True, slots=True)
class CdcTable:
    """A table as a vector table names it, and the column whose values its events are to name."""

    table: str
    primary_key_column: str


@dataclass(frozen=True, slots=True)
class Subscription:
    """How the feed stands after `subscribe`."""

    position: int
    """Everything committed from here on is given by `read`."""
    joined: frozenset[CdcTable]
    """Followed from now on only: what changed in them before may have been missed. Empty where nothing was missed."""
    shapes: Mapping[CdcTable, TableFingerprint]
    """Those that are followed, as they are now: to be kept once the joined ones are sure to be compared."""
    refused: Mapping[CdcTable, EmbeddError]
    """Those that cannot be followed, each with what to do about it; the others are followed all the same."""
    hidden: frozenset[CdcTable] = frozenset()
    """Refused ones of which we see only some rows: what we see no more is to be removed, so they are to be compared."""
    lost: str | None = None
    """Why the position kept by the source could not be gone on from, in a sentence for users; None where it could."""


@dataclass(slots=True)
class ChangeBatch:
    """Some changes, in the order of their commits."""

    keys: dict[CdcTable, list[Key]] = field(default_factory=dict)
    """Keys whose rows are to be read again, each once a batch: inserted, changed, deleted, renamed from and to."""
    truncated: set[CdcTable] = field(default_factory=set)
    """Tables that were emptied at once; whatever keys are here of them may be of before or after that."""
    broken: dict[CdcTable, EmbeddError] = field(default_factory=dict)
    """Tables of which an event could not be understood, as its key column is gone: they have to be compared."""
    change_count: int = 0
    committed_at: datetime | None = None
    """When the oldest transaction here was committed, by the source's clock."""
    position: int | None = None
    """What may be confirmed once this batch and all before it are applied; None in the middle of a transaction."""
    transactions: set[int] = field(default_factory=set)
    """Which transactions made the changes, by the source's own numbers. Only for the feed to read."""


class CdcStream(Protocol):
    """One position in a source's log. Used by one thread; `lag_bytes` by any."""

    def subscribe(
        self,
        tables: Sequence[CdcTable],
        known_position: int | None,
        known_shapes: Mapping[CdcTable, TableFingerprint | None],
    ) -> Subscription:
        """Makes the source keep its log for exactly these tables, from a position on.

        Idempotent and cheap, so that it is called again from time to time to notice what others have done to it: tables
        whose shape has changed join again, a feed that is gone or was moved beyond `known_position` (the position last
        passed to `confirm`) begins anew and says so. `known_shapes`: of the tables that were followed until now, as
        last kept; None where none was. Raises SourceRejected, with the statements to run, where the database as a
        whole cannot be followed.
        """
        ...

    def read(self, *, max_keys: int) -> Generator[ChangeBatch, None, None]:
        """What was committed since the confirmed position, in batches of about `max_keys` keys at most.

        Ends when nothing more has been committed by now; the last batch has a position, and may have no keys.
        A transaction of any size takes bounded memory: it comes in several batches. A batch is given when a statement
        that begins afterwards sees all of its rows. Raises SourceUnavailable where that takes too long, and CdcPositionLost
        when the source does not keep the position any more: `subscribe` begins anew.
        """
        ...

    def confirm(self, position: int) -> None:
        """Lets the source forget its log up to here. Idempotent."""
        ...

    @property
    def is_altered(self) -> bool:
        """Whether the last `read` has found that a followed table was altered: `subscribe` is to be called at once."""
        ...

    def lag_bytes(self) -> int | None:
        """How much of its log the source keeps for this feed; None where it keeps none for it."""
        ...

    def drop(self) -> None:
        """Removes whatever the feed has made in the source. Idempotent."""
        ...

    def close(self) -> None:
        """Gives connections back; the source goes on keeping the position. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
