"""What an embedding provider must be able to do, for one model at given dimensions.

An embedder is a raw client: one call is one request. It does not retry, pace or pack; `engine/pacing` does that for all
embedders. It raises only EmbeddingUnavailable and EmbeddingRateLimited (try again, with `retry_after_seconds` if the
provider said so), EmbeddingRejected (every text would fail) and TextRejected (one of these texts is at fault). Error
messages never contain a text or a key.

Pacing reads these details of an error: `failure` (`Failure`), `too_large` (fewer texts may be accepted), `too_long` (a
shorter text may be accepted), `max_input_tokens` and `max_request_tokens` as the provider states them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.core.text_cutting import CutText

DEFAULT_TIMEOUT_SECONDS: Final = 60.0
"""How long a run waits for one answer."""
PROBE_TEXT: Final = "embedd"
"""A harmless text: if a provider refuses it, the text is not the reason."""


class Failure(Enum):
    """What came instead of an answer."""

    ERROR = auto()
    """An error status, or no connection."""
    TIMEOUT = auto()
    NONSENSE = auto()
    """An answer that does not follow the protocol."""
    UNUSABLE = auto()
    """An answer without a single usable vector."""
    REFUSED = auto()
    """A refusal that looks as if every text would be refused."""


class Embedded(NamedTuple):
    """The answer of one request: `vectors` is float32, (n, dimensions), in the order of the texts.

    A vector that the provider did not give in a usable form may be NaN, zeros or of any length. The caller checks them.
    """

    vectors: Vectors
    tokens: int
    """As the provider counted them; estimated if it did not."""


@dataclass(frozen=True, slots=True)
class EmbedderLimits:
    """What the provider accepts. `concurrency` is the highest number of requests in flight."""

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
        """Closes connections. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
