"""Embedding providers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from embedd_dagster.connectors import registry
from embedd_dagster.connectors.http.base_url import UnusableUrl, parse_base_url

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Name, NameIn, Timestamp, unset

_MAX_LIMIT = 1_000_000_000

ProviderName = Annotated[str, NameIn(registry.embedders)]
"""A registered connector that has an embedder."""


def _http_url(value: str) -> str:
    try:
        parse_base_url(value)
    except UnusableUrl as error:
        raise PydanticCustomError("base_url", str(error)) from None
    return value


def _one_line(value: str) -> str:
    if not value.isascii() or any(character <= " " or character == "\x7f" for character in value):
        raise PydanticCustomError("api_key", "printable ASCII characters without blanks are accepted")
    return value


class EmbeddingCredentials(Body):
    """How to reach a provider. Encrypted at rest; the key is never returned."""

    api_key: Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_one_line)] = Field(
        default_factory=unset,
        description="Required for OpenAI itself; a server behind `base_url` may need none",
        json_schema_extra={"writeOnly": True, "pattern": "^[!-~]+$"},
    )
    base_url: Annotated[str, StringConstraints(min_length=1, max_length=2048), AfterValidator(_http_url)] | None = (
        Field(
            default=None,
            description="Any server that speaks OpenAI's protocol (vLLM, Ollama, TEI, LiteLLM, Azure), up to and with `/v1`",
            examples=["http://localhost:11434/v1"],
        )
    )

    def as_given(self) -> dict[str, Any]:
        """Only what was given."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class EmbeddingLimits(Body):
    """What your account or your own server allows; what is left out is found out by the provider's answers."""

    requests_per_minute: int | None = Field(default=None, ge=1, le=_MAX_LIMIT)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=_MAX_LIMIT)
    concurrency: int | None = Field(default=None, ge=1, le=256, description="Requests in flight at the most")
    max_batch_items: int | None = Field(
        default=None, ge=1, le=2048, description="Texts in one request at the most; the provider's own limit stays"
    )
    max_batch_tokens: int | None = Field(
        default=None, ge=16, le=_MAX_LIMIT, description="Tokens in one request at the most, as estimated"
    )
    request_timeout_seconds: int | None = Field(
        default=None,
        ge=1,
        le=3600,
        description="How long a run waits for one answer, 60 if left out; a query waits no longer than its own limit",
    )
    max_input_tokens: int | None = Field(
        default=None,
        ge=16,
        le=1_000_000,
        description="What the model reads of one text, such as 512; longer texts are cut and counted as truncated",
    )


class EmbeddingProviderCreate(Body):
    """A new embedding provider."""

    name: Name = Field(description="Unique in the environment", examples=["openai"])
    provider: ProviderName = Field(
        description="Whose protocol it speaks; `local` is a small model in the process, without a key"
    )
    credentials: EmbeddingCredentials = Field(default_factory=EmbeddingCredentials)
    limits: EmbeddingLimits = Field(default_factory=EmbeddingLimits)


class EmbeddingProviderUpdate(Body):
    """What may be changed of an embedding provider; what is left out stays."""

    immutable_fields = frozenset({"id", "org_id", "environment_id", "provider"})

    name: Name = Field(default_factory=unset, description="Another name")
    credentials: EmbeddingCredentials = Field(
        default_factory=unset, description="All of them: the stored key is never sent to another base_url"
    )
    limits: EmbeddingLimits = Field(
        default_factory=unset, description="All of them; limits that are left out are removed"
    )


class EmbeddingProviderTest(Body):
    """What to test an embedding provider with."""

    embedding_model: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(
        default_factory=unset, description="Left out: one that a vector table uses, or the provider's first"
    )
    embedding_dimensions: int = Field(default_factory=unset, ge=1, le=16_000)


class EmbeddingProviderAnswer(Answer):
    """An embedding provider, without its key."""

    id: str = Field(examples=["ep_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str
    environment_id: str
    name: str
    provider: ProviderName
    base_url: str | None
    limits: dict[str, int | None]
    status: Literal["pending", "connected", "failed"] = Field(
        description="The outcome of the last test; `pending`: none yet, or a server of your own that answers, "
        "and was not asked for a model that it has"
    )
    last_error: str | None = Field(description="Why the last test failed")
    tested_at: Timestamp | None
    created_at: Timestamp
    updated_at: Timestamp


class EmbeddingProviderList(ListAnswer[EmbeddingProviderAnswer]):
    """A page of embedding providers."""


class EmbeddingModelAnswer(Answer):
    """A model of the catalog. A server behind a `base_url` may have others."""

    provider: ProviderName
    model: str = Field(description="As `embedding_model` spells it", examples=["text-embedding-3-small"])
    dimensions: int = Field(description="What it gives by itself", examples=[1536])
    accepted_dimensions: str = Field(description="What it can be asked for", examples=["1 to 1536"])
    min_dimensions: int | None = Field(description="Set where any number from here to `dimensions` may be asked for")
    other_dimensions: list[int] = Field(description="Further single numbers that may be asked for")
    max_tokens: int = Field(description="Longer texts are cut", examples=[8192])
    price_per_million_tokens: float = Field(description="US dollars, list price; only for estimates", examples=[0.02])


class EmbeddingModelList(ListAnswer[EmbeddingModelAnswer]):
    """Every model of the catalog."""
