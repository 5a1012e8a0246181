"""Decides whether requests fail because of their texts or because of the provider.

A harmless probe text decides. If the provider answers it right after it failed on the texts, the texts are at fault, and
the batch is halved until the failing text is found. If the probe fails too, the provider is down, and the run waits.
"""

from __future__ import annotations

from typing import Final

from embedd_dagster.errors import EmbeddError
from embedd_dagster.protocols.embedder import Failure

_FAILURES_BEFORE_PROBE: Final = 2
_FAILURES_OF_ONE_TEXT: Final = 4
"""Requests with this text. With fewer, an overloaded provider that fails every third request would cost rows."""
_TIMEOUTS_OF_ONE_TEXT: Final = 2
"""Requests with this text only: before that, it may have waited behind others."""


def failure_of(error: EmbeddError) -> Failure:
    """The kind of failure that an embedder's error reports."""
    return error.details.get("failure", Failure.ERROR)  # type: ignore[no-any-return]


class FaultIsolation:
    """The failures of one range of texts. `failures` counts the failed requests that contained all of these texts."""

    def __init__(self, text_count: int, failures: int = 0, *, is_probing: bool = False) -> None:
        self.failures = failures
        self.is_probing = is_probing
        """Whether the next request is the probe."""
        self._text_count = text_count
        self._is_part = failures > 0
        self._own_failures = 0
        self._has_probe_failed = False

    def texts_failed(self, failure: Failure) -> bool:
        """Records that the texts failed. True: halve them now, without a probe."""
        self.failures += 1
        self._own_failures += 1
        self._has_probe_failed = False
        if self._text_count > 1 and failure is not Failure.UNUSABLE and (self._is_part or failure is Failure.TIMEOUT):
            return True
        self.is_probing = self._needs_probe(failure)
        return False

    def _needs_probe(self, failure: Failure) -> bool:
        if failure is Failure.REFUSED:
            return True
        if failure is Failure.NONSENSE and self._text_count > 1:
            return True
        if failure is Failure.TIMEOUT:
            return self._own_failures >= _TIMEOUTS_OF_ONE_TEXT
        if failure is Failure.ERROR and self._text_count == 1:
            return self.failures >= _FAILURES_OF_ONE_TEXT
        return self.failures >= _FAILURES_BEFORE_PROBE

    def probe_failed(self) -> None:
        """Records that the provider fails on the probe too."""
        self._has_probe_failed = True

    def probe_answered(self) -> bool:
        """Records that the provider answers the probe. True: the texts are at fault."""
        self.is_probing = False
        # after an outage the texts get another chance
        return not self._has_probe_failed
