"""Whether a request fails because of its texts or because of the provider.

A harmless probe text decides. If the provider answers it right after it failed on the texts, the texts are at fault, and
the batch is halved down to the guilty one. If it fails on the probe too, the provider is down, and is waited for.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from embedd_dagster.errors import EmbeddError

PROBE_TEXT: Final = "embedd"
"""A harmless text: what is refused for it is not the fault of a text."""
_FAILURES_BEFORE_PROBE: Final = 2
_FAILURES_OF_A_GUILTY_TEXT: Final = 4
"""Of requests that held it. With fewer, an overloaded provider that fails every third request would cost rows."""
_TIMEOUTS_OF_A_GUILTY_TEXT: Final = 2
"""Of requests for it alone: before that, it may have waited behind others."""


class Failure(Enum):
    """What came instead of an answer."""

    ERROR = auto()
    """A bad status, or no connection."""
    TIMEOUT = auto()
    NONSENSE = auto()
    """An answer, but not of the protocol."""
    UNUSABLE = auto()
    """An answer with not a single usable vector."""
    REFUSED = auto()
    """A refusal that looks as if every text would be refused."""


def failure_of(error: EmbeddError) -> Failure:
    """The kind of failure that an embedder's error reports."""
    return error.details.get("failure", Failure.ERROR)  # type: ignore[no-any-return]


class Suspicion:
    """What the failures of one range of texts say about it. `strikes` counts failed requests that held all of these texts."""

    def __init__(self, text_count: int, strikes: int = 0, *, is_probing: bool = False) -> None:
        self.strikes = strikes
        self.is_probing = is_probing
        """Whether the next request is the probe."""
        self._text_count = text_count
        self._is_part = strikes > 0
        self._own_failures = 0
        self._has_probe_failed = False

    def texts_failed(self, failure: Failure) -> bool:
        """Notes that the texts failed. True: halve them now, without a probe."""
        self.strikes += 1
        self._own_failures += 1
        self._has_probe_failed = False
        if self._text_count > 1 and failure is not Failure.UNUSABLE and (self._is_part or failure is Failure.TIMEOUT):
            return True
        self.is_probing = self._is_suspect(failure)
        return False

    def _is_suspect(self, failure: Failure) -> bool:
        if failure is Failure.REFUSED:
            return True
        if failure is Failure.NONSENSE and self._text_count > 1:
            return True
        if failure is Failure.TIMEOUT:
            return self._own_failures >= _TIMEOUTS_OF_A_GUILTY_TEXT
        if failure is Failure.ERROR and self._text_count == 1:
            return self.strikes >= _FAILURES_OF_A_GUILTY_TEXT
        return self.strikes >= _FAILURES_BEFORE_PROBE

    def probe_failed(self) -> None:
        """Notes that the provider fails on the probe too."""
        self._has_probe_failed = True

    def probe_answered(self) -> bool:
        """Notes that the provider answers the probe. True: the texts are at fault."""
        self.is_probing = False
        # after an outage the texts get another chance
        return not self._has_probe_failed
