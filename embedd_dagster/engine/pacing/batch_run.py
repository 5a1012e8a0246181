"""One batch of texts: the failing texts are found, the others get their vectors.

- A rejected batch (400) is halved until each failing text is alone.
- No usable answer (5xx, timeout, nonsense, a 403): a harmless text is sent. If it is answered, the batch is halved like a
  rejected one. If not, the provider is down, and the run waits (`fault_isolation.py`).
- Single vectors without a direction: only their texts are sent again, once.
- A text that is too long for the model is cut, and the batch is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.text_cutting import byte_count, cut_at_bytes, limit_that_keeps
from embedd_dagster.engine.pacing.fault_isolation import FaultIsolation, failure_of
from embedd_dagster.engine.pacing.sending import Sender, Usable
from embedd_dagster.errors import (
    EmbeddError,
    EmbeddingRateLimited,
    EmbeddingRejected,
    EmbeddingUnavailable,
    TextRejected,
)
from embedd_dagster.protocols.embedder import PROBE_TEXT, Failure

_REJECTIONS_BEFORE_PROBE = 32
_NONSENSE_PROBES = 2
_SHORTEST_CUT_BYTES = 64

Indexes = Sequence[int]
"""Positions in a batch: a range until something goes wrong."""


class _TextsFail(Exception):
    """The provider works, and fails on these texts."""

    def __init__(self, error: EmbeddError, failures: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.failures = failures


class BatchRun:
    """One batch in progress, used by one thread."""

    def __init__(self, sender: Sender, texts: Sequence[str], shorten: Callable[[str, int | None], str]) -> None:
        """`shorten` cuts a text at the model's limit, or at a lower one that the provider has stated."""
        self.failed: dict[int, TextRejected] = {}
        self.cut: dict[int, str] = {}
        self.tokens = 0
        self.requests = 0
        self._sender = sender
        self._shorten_text = shorten
        self._texts = list(texts)
        self._parts: list[tuple[Indexes, Vectors]] = []
        self._has_provider_answered_probe = False
        self._failing_since: float | None = None
        self._nonsense_probes = 0
        self._is_limit_unknown = False

    def embed(self) -> None:
        """Returns when every text has a vector or has failed. Raises as `PacedEmbedder.embed`."""
        for indexes in self._requests_for(range(len(self._texts))):
            self._embed_some(indexes)

    def _requests_for(self, indexes: Indexes) -> Iterator[Indexes]:
        return self._sender.size.split(indexes, lambda index: self._sender.estimate_tokens(self._texts[index]))

    def vectors(self) -> Vectors:
        """The vectors in the order of the texts, NaN for those that failed; (n, 0) if all failed."""
        if len(self._parts) == 1 and not self.failed:
            return self._parts[0][1]
        dimensions = self._parts[0][1].shape[1] if self._parts else 0
        vectors = np.full((len(self._texts), dimensions), np.nan, dtype=np.float32)
        for indexes, part in self._parts:
            vectors[_selection(indexes)] = part
        return vectors

    def _embed_some(self, indexes: Indexes, failures: int = 0, *, is_second: bool = False) -> bool:
        """Whether all of these texts got a vector. `is_second`: they got an unusable one before, and others did not."""
        try:
            usable = self._request(indexes, FaultIsolation(len(indexes), failures), is_second=is_second)
        except TextRejected as error:
            return self._solve_rejection(indexes, error)
        except _TextsFail as failure:
            return self._solve_failure(indexes, failure)
        self.tokens += usable.tokens
        if usable.mask is None:
            self._parts.append((indexes, usable.vectors))
            if self._is_limit_unknown:
                self._learn_limit(self._texts[indexes[0]])
            return True
        self._parts.append(
            ([index for index, good in zip(indexes, usable.mask, strict=True) if good], usable.vectors[usable.mask])
        )
        bad = [index for index, good in zip(indexes, usable.mask, strict=True) if not good]
        if not is_second:
            return self._embed_some(bad, failures + 1, is_second=True)
        self.failed.update(dict.fromkeys(bad, _without_direction()))
        return False

    def _solve_rejection(self, indexes: Indexes, error: TextRejected) -> bool:
        """Handles texts of which the provider refuses at least one."""
        if error.details.get("too_long") and self._shorten(indexes, error):
            return self._embed_some(indexes)
        if len(indexes) == 1:
            self.failed[indexes[0]] = error
            self._check_provider()
            return False
        if (most := error.details.get("max_request_tokens")) and self._sender.size.note_token_limit(most):
            parts = list(self._requests_for(indexes))
            if len(parts) > 1:
                results = [self._embed_some(part) for part in parts]
                return all(results)
        left, right = _halves(indexes)
        is_whole = self._embed_some(left) & self._embed_some(right)
        if is_whole and error.details.get("too_large") and not most:
            # the batch was too large, not a text at fault: the server accepts less than its protocol says
            self._sender.size.note_too_large(len(right))
        return is_whole

    def _solve_failure(self, indexes: Indexes, failure: _TextsFail) -> bool:
        """Handles texts that the provider fails on while it answers for others."""
        error = failure.error
        kind = failure_of(error)
        if len(indexes) == 1 or kind is Failure.UNUSABLE:
            rejected = (
                _without_direction()
                if kind is Failure.UNUSABLE
                else TextRejected(f"The provider fails on this text while it answers for others ({error.message})")
            )
            self.failed.update(dict.fromkeys(indexes, rejected))
            return False
        left, right = _halves(indexes)
        return self._embed_some(left, failure.failures) & self._embed_some(right, failure.failures)

    def _shorten(self, indexes: Indexes, error: TextRejected) -> bool:
        """Cuts texts that are too long for the model. False: nothing was cut, or the too long text must be found first."""
        stated = error.details.get("max_input_tokens")
        shorter = {index: self._shorten_text(self._texts[index], stated) for index in indexes}
        shorter = {index: text for index, text in shorter.items() if text != self._texts[index]}
        if not shorter and len(indexes) == 1:
            # the estimate was too low for this text, or the provider states no limit
            text = self._texts[indexes[0]]
            half = cut_at_bytes(text, byte_count(text) // 2).text.rstrip()
            if byte_count(half) >= _SHORTEST_CUT_BYTES:
                shorter = {indexes[0]: half}
                self._is_limit_unknown = stated is None
        for index, text in shorter.items():
            self._texts[index] = self.cut[index] = text
        return bool(shorter)

    def _learn_limit(self, accepted: str) -> None:
        """A text was halved until it was accepted: its length counts as the model's limit from now on."""
        self._is_limit_unknown = False
        self._shorten_text(accepted, limit_that_keeps(accepted))

    def _check_provider(self) -> None:
        """Raises EmbeddingRejected if only failures came so far, many of them, and a harmless text fails too."""
        if self._parts or self._has_provider_answered_probe or len(self.failed) < _REJECTIONS_BEFORE_PROBE:
            return
        isolation = FaultIsolation(1, is_probing=True)
        with suppress(_TextsFail):
            self._request([next(iter(self.failed))], isolation)
        self._has_provider_answered_probe = True

    def _request(self, indexes: Indexes, isolation: FaultIsolation, *, is_second: bool = False) -> Usable:
        """One answer, after as many tries as it takes. Raises as `embed` does, and TextRejected and _TextsFail."""
        texts = self._select(indexes)
        failures = 0
        last: EmbeddError = TextRejected("The provider refuses this text.")
        while True:
            try:
                if isolation.is_probing:
                    self._probe()
                    if isolation.probe_answered():
                        raise _TextsFail(last, isolation.failures)
                usable = self._send(texts)
                if is_second or usable.mask is None or usable.mask.any():
                    return usable
                raise _unusable(len(texts))
            except EmbeddingRejected as error:
                if isolation.is_probing or failure_of(error) is not Failure.REFUSED:
                    raise
                last = error
                if is_second:
                    # such as vectors of another length: others of the same answer were usable
                    raise _TextsFail(_unusable(len(texts)), isolation.failures) from None
                if isolation.texts_failed(Failure.REFUSED):
                    raise _TextsFail(error, isolation.failures) from None
            except EmbeddingUnavailable as error:
                failures += 1
                last = self._note_failure(error, isolation, last, len(texts))
                self._failing_since = self._failing_since or self._sender.now()
                self._sender.wait_for_next_try(error, failures, self._failing_since)

    def _send(self, texts: Sequence[str]) -> Usable:
        self.requests += 1
        return self._sender.send(texts)

    def _select(self, indexes: Indexes) -> list[str]:
        if len(indexes) == len(self._texts):
            return self._texts
        return [self._texts[index] for index in indexes]

    def _note_failure(
        self, error: EmbeddingUnavailable, isolation: FaultIsolation, last: EmbeddError, text_count: int
    ) -> EmbeddError:
        """The error to report for these texts after this failure. Raises if it ends the attempts."""
        if isinstance(error, EmbeddingRateLimited):
            return last
        kind = failure_of(error)
        if isolation.is_probing:
            isolation.probe_failed()
            if kind in {Failure.NONSENSE, Failure.UNUSABLE}:
                self._note_nonsense(error)
            return last
        if kind is Failure.TIMEOUT and text_count > 1:
            self._sender.size.note_timeout(text_count)
        if isolation.texts_failed(kind):
            raise _TextsFail(error, isolation.failures)
        return error

    def _note_nonsense(self, error: EmbeddingUnavailable) -> None:
        """Raises EmbeddingRejected if the provider has never given a usable vector, not even for a harmless text."""
        self._nonsense_probes += 1
        if self._nonsense_probes >= _NONSENSE_PROBES and not self._sender.has_answered:
            raise EmbeddingRejected(
                f"The provider gives no usable vector, not even for a harmless text. {error.message}",
                resolution="Check the embedding provider's base_url, and the model at it, with "
                "POST /v1/embedding-providers/{id}/test.",
            )

    def _probe(self) -> None:
        """Returns if the provider gives a harmless text its vector. Raises EmbeddingRejected if it refuses that too."""
        try:
            usable = self._send([PROBE_TEXT])
        except TextRejected as error:
            raise EmbeddingRejected(
                f"The provider refuses every text, a harmless one as well. It says: {error.message}",
                resolution="Check the vector table's embedding_model and the account behind the embedding provider.",
            ) from None
        if usable.mask is not None:
            raise _unusable(1)
        self.tokens += usable.tokens


def _halves(indexes: Indexes) -> tuple[Indexes, Indexes]:
    middle = len(indexes) // 2
    return indexes[:middle], indexes[middle:]


def _unusable(text_count: int) -> EmbeddingUnavailable:
    given = "a vector" if text_count == 1 else f"{text_count} vectors"
    return EmbeddingUnavailable(
        f"The provider gave {given} without a direction: only zeros, numbers that are not finite, or another length than "
        "the model's.",
        resolution="Check what the model behind the embedding provider gives.",
        failure=Failure.UNUSABLE,
    )


def _without_direction() -> TextRejected:
    return TextRejected(
        "The provider gives this text a vector without a direction: only zeros, numbers that are not finite, or another "
        "length than the other vectors have.",
        resolution="Change the row's text, or embed with another model.",
    )


def _selection(indexes: Indexes) -> Any:
    return slice(indexes.start, indexes.stop) if isinstance(indexes, range) else list(indexes)
