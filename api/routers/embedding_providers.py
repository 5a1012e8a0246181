"""Embedding providers."""

from __future__ import annotations

import time
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import APIRouter

from api.auth import Caller, Reader, Writer
from api.errors import answers
from api.idempotency import Once, answers_once
from api.outside import OUTSIDE
from api.pagination import DEFAULT_LIMIT, Cursor, Limit, list_answer, read_cursor
from api.schemas.base import EmbeddingProviderId
from api.schemas.connections import TestAnswer
from api.schemas.embedding_providers import (
    EmbeddingCredentials,
    EmbeddingLimits,
    EmbeddingProviderAnswer,
    EmbeddingProviderCreate,
    EmbeddingProviderList,
    EmbeddingProviderTest,
    EmbeddingProviderUpdate,
)
from api.strict_json import StrictRoute
from embedd_dagster.catalog import embedding_providers
from embedd_dagster.catalog.tables import EmbeddingProvider
from embedd_dagster.core.models import EMBEDDING_MODELS, ProviderKind, find_model
from embedd_dagster.embedders import open_embedder
from embedd_dagster.embedders.question import embed_question
from embedd_dagster.errors import EmbeddError, SourceRejected, SourceUnavailable, ValidationFailed
from embedd_dagster.sources.network import allowed_addresses

router = APIRouter(prefix="/embedding-providers", tags=["Embedding providers"], route_class=StrictRoute)

_TEST_TIMEOUT_SECONDS: Final = 10.0


@router.post(
    "",
    status_code=201,
    dependencies=OUTSIDE,
    responses=answers_once(201, "permission_denied", "name_conflict", "server_busy"),
)
def create_embedding_provider(body: EmbeddingProviderCreate, caller: Writer, attempt: Once) -> EmbeddingProviderAnswer:
    """Create an embedding provider: an account, or a server that speaks OpenAI's protocol."""
    runtime = caller.state.runtime
    with attempt:
        _check_limits(body.provider, body.limits)
        credentials = _checked(caller, ProviderKind(body.provider), body.credentials)
        with runtime.catalog.transaction() as session:
            row = embedding_providers.create(
                session,
                runtime.box,
                caller.environment,
                name=body.name,
                provider=body.provider,
                credentials=credentials,
                limits=body.limits.model_dump(exclude_none=True),
            )
            return attempt.answer(session, EmbeddingProviderAnswer.model_validate(row))


def _checked(caller: Caller, kind: ProviderKind, given: EmbeddingCredentials) -> dict[str, Any]:
    """The credentials, if this provider takes them. Raises ValidationFailed."""
    credentials = given.as_given()
    if kind is ProviderKind.LOCAL:
        if credentials:
            raise ValidationFailed(f"credentials.{next(iter(credentials))}: the local provider takes no credentials.")
        return credentials
    if "base_url" not in credentials:
        if "api_key" not in credentials:
            raise ValidationFailed("credentials.api_key: required, unless base_url names a server that needs none.")
        return credentials
    _check_address(caller, credentials["base_url"])
    return credentials


def _check_limits(kind: str, limits: EmbeddingLimits) -> None:
    """Raises ValidationFailed for a limit that the provider cannot keep."""
    if kind != ProviderKind.LOCAL:
        return
    for name in ("request_timeout_seconds", "max_input_tokens"):
        if getattr(limits, name) is not None:
            raise ValidationFailed(
                f"limits.{name}: the local provider has a fixed model and no requests; leave it out."
            )


def _check_address(caller: Caller, base_url: str) -> None:
    """Refuses addresses that the service must not connect to; a name that does not resolve yet may pass."""
    parts = urlsplit(base_url)
    try:
        allowed_addresses(
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
            deny_private_networks=caller.state.settings.deny_private_networks,
        )
    except SourceRejected as error:
        raise ValidationFailed(f"credentials.base_url: {error.message}", resolution=error.resolution) from None
    except SourceUnavailable:
        return


@router.get("", responses=answers())
def list_embedding_providers(
    caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None
) -> EmbeddingProviderList:
    """List embedding providers."""
    after = read_cursor(cursor)
    with caller.state.runtime.catalog.transaction() as session:
        page = embedding_providers.page(session, caller.environment.id, limit, after)
    return list_answer(EmbeddingProviderList, page, limit, EmbeddingProviderAnswer.model_validate)


@router.get("/{embedding_provider_id}", responses=answers("embedding_provider_not_found"))
def get_embedding_provider(embedding_provider_id: EmbeddingProviderId, caller: Reader) -> EmbeddingProviderAnswer:
    """Get an embedding provider."""
    return EmbeddingProviderAnswer.model_validate(_get(caller, embedding_provider_id))


def _get(caller: Caller, embedding_provider_id: str) -> EmbeddingProvider:
    with caller.state.runtime.catalog.transaction() as session:
        return embedding_providers.get(session, caller.environment.id, embedding_provider_id)


@router.put(
    "/{embedding_provider_id}",
    dependencies=OUTSIDE,
    responses=answers("permission_denied", "embedding_provider_not_found", "name_conflict", "server_busy"),
)
def update_embedding_provider(
    embedding_provider_id: EmbeddingProviderId, body: EmbeddingProviderUpdate, caller: Writer
) -> EmbeddingProviderAnswer:
    """Rename an embedding provider, or give it other credentials or limits."""
    given = body.model_fields_set
    kind = ProviderKind(_get(caller, embedding_provider_id).provider)
    credentials = _checked(caller, kind, body.credentials) if "credentials" in given else {}
    with caller.state.runtime.catalog.transaction() as session:
        row = embedding_providers.get(session, caller.environment.id, embedding_provider_id, lock=True)
        if "name" in given:
            embedding_providers.rename(session, row, body.name)
        if "credentials" in given:
            embedding_providers.set_credentials(row, caller.state.runtime.box, credentials)
        if "limits" in given:
            _check_limits(row.provider, body.limits)
            embedding_providers.set_limits(row, body.limits.model_dump(exclude_none=True))
    return EmbeddingProviderAnswer.model_validate(row)


@router.delete(
    "/{embedding_provider_id}",
    status_code=204,
    responses=answers("permission_denied", "embedding_provider_not_found", "embedding_provider_conflict"),
)
def delete_embedding_provider(embedding_provider_id: EmbeddingProviderId, caller: Writer) -> None:
    """Delete an embedding provider that no vector table uses."""
    with caller.state.runtime.catalog.transaction() as session:
        embedding_providers.delete(session, caller.environment.id, embedding_provider_id)


@router.post(
    "/{embedding_provider_id}/test",
    dependencies=OUTSIDE,
    responses=answers("permission_denied", "embedding_provider_not_found", "server_busy"),
)
def check_embedding_provider(
    embedding_provider_id: EmbeddingProviderId, caller: Writer, body: EmbeddingProviderTest | None = None
) -> TestAnswer:
    """Test an embedding provider by embedding one word. A failed test is a 200 with `status: failed`."""
    row = _get(caller, embedding_provider_id)
    model, dimensions = _test_model(caller, row, body)
    begun = time.perf_counter()
    fault: str | None = None
    try:
        with open_embedder(
            row.provider,
            credentials=embedding_providers.open_credentials(row, caller.state.runtime.box),
            model=model,
            dimensions=dimensions,
            limits=row.limits,
            timeout_seconds=min(_TEST_TIMEOUT_SECONDS, caller.state.settings.request_timeout_seconds),
            deny_private_networks=caller.state.settings.deny_private_networks,
        ) as embedder:
            embed_question(embedder, "test")
    except EmbeddError as error:
        fault = f"{error.message} {error.resolution}"
    latency_ms = round((time.perf_counter() - begun) * 1000, 1)
    return TestAnswer(status="failed" if fault else "ok", latency_ms=latency_ms, error=fault)


def _test_model(caller: Caller, row: EmbeddingProvider, body: EmbeddingProviderTest | None) -> tuple[str, int]:
    """The model to test with: the one asked for, else one in use, else the catalog's first."""
    kind = ProviderKind(row.provider)
    given = body.model_fields_set if body else set()
    if body is not None and "embedding_model" in given:
        known = find_model(kind, body.embedding_model)
        if "embedding_dimensions" in given:
            return body.embedding_model, body.embedding_dimensions
        if known is not None:
            return known.name, known.dimensions
        raise ValidationFailed("embedding_dimensions: required for a model that the catalog does not know.")
    if "embedding_dimensions" in given:
        raise ValidationFailed("embedding_dimensions: only accepted together with embedding_model.")
    with caller.state.runtime.catalog.transaction() as session:
        used = embedding_providers.find_used_model(session, row.id)
    if used is not None:
        return used
    first = next(model for model in EMBEDDING_MODELS if model.provider is kind)
    return first.name, first.dimensions
