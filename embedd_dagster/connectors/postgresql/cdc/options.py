"""How long a CDC stream waits for others, and how much it decodes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The defaults suit production."""

    peek_messages: int = 200_000
    """Messages that the server decodes at once, into temporary files; then it continues to the end of the transaction.
    Each time costs it a pass over its log from the slot's restart position on."""
    visible_seconds: float = 5.0
    """How long rows of a commit that waits for a standby may take to become visible."""
    writers_seconds: float = 2.0
    """How long transactions that have written to a newly subscribed table may take to end."""
    commits_seconds: float = 20.0
    """As `writers_seconds`, for a new slot on a server whose commits may wait for a standby."""
    create_seconds: float = 20.0
    """How long creating a slot may wait for open transactions."""
