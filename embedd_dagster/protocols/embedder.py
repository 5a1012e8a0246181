"""What an embedding provider must be able to do, for one model at given dimensions.

An embedder is one raw client: one call is one request. It does not retry, does not pace, does not pack: `pacing.py`
does that for all of them. It raises only: EmbeddingUnavailable and EmbeddingRateLimited (try again, with
`retry_after_seconds` where the provider said), EmbeddingRejected (every text would fail), TextRejected (one of these
texts is the fault). Error messages never hold a text or a key.

Details of an error that pacing goes by: `failure` (`suspicion.Failure`), `too_large` (fewer texts may be taken), `too_long`
(a shorter text may be taken), `max_input_tokens` and `max_request_tokens` as the provider states them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits

DEFAULT_TIMEOUT_SECONDS: Final = 60.0
"""How long a run waits for one answer."""


class Embedded(NamedTuple):
    """The answer of one request: `vectors` is float32, (n, dimensions), in the order of the texts.

    A vector that the provider did not give in a usable form may be NaN, zeros or of any length: the caller checks them all.
    """

    vectors: Vectors
    tokens: int
    """As the provider counted them, else estimated."""


class CutText(NamedTuple):
    """A text within the model's limit."""

    text: str
    tokens: int
    """An estimate, not below what the provider will count, where that can be had cheaply."""
    truncated: bool


@dataclass(frozen=True, slots=True)
class EmbedderLimits:
    """What the provider takes. `concurrency` is how many requests may be in flight at the most."""

    batch: BatchLimits
    max_tokens_per_text: int
    concurrency: int


class Embedder(Protocol):
    """One model of one provider. Safe to use from several threads."""

    limits: EmbedderLimits

    def cut(self, text: str) -> CutText:
        """The text cut at the model's token limit, with its estimated tokens. Pure and cheap: called for every row."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts, which are within every limit: one request."""
        ...

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        ...

    def close(self) -> None:
        """Gives connections back. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
