"""Embedding providers."""

from __future__ import annotations

import time
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import APIRouter

from embedd_dagster.catalog import embedding_providers
from embedd_dagster.catalog.tables import EmbeddingProvider
from embedd_dagster.connectors.network import AddressForbidden, NameUnknown, vetted_addresses
from embedd_dagster.connectors.registry import embedder_spec, open_embedder
from embedd_dagster.core.models import find_model
from embedd_dagster.engine.question import embed_question
from embedd_dagster.errors import (
    EmbeddError,
    EmbeddingRejected,
    RowError,
    ValidationFailed,
)

from ..auth import Caller, Reader, Writer
from ..error_codes import error_responses
from ..idempotency import Idempotent, IdempotentRequest, idempotent_responses
from ..limits import EXTERNAL_CALLS
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, NameFilter, PageRequest, list_answer
from ..schemas.base import EmbeddingProviderId
from ..schemas.connections import TestAnswer
from ..schemas.embedding_providers import (
    EmbeddingCredentials,
    EmbeddingLimits,
    EmbeddingProviderAnswer,
    EmbeddingProviderCreate,
    EmbeddingProviderList,
    EmbeddingProviderTest,
    EmbeddingProviderUpdate,
)
from ..strict_json import StrictRoute

router = APIRouter(prefix="/embedding-providers", tags=["Embedding providers"], route_class=StrictRoute)

_TEST_TIMEOUT_SECONDS: Final = 10.0


@router.post(
    "",
    status_code=201,
    dependencies=EXTERNAL_CALLS,
    responses=idempotent_responses(201, "permission_denied", "name_conflict", "server_busy"),
)
def create_embedding_provider(
    body: EmbeddingProviderCreate, caller: Writer, idempotent: Idempotent
) -> EmbeddingProviderAnswer:
    """Create an embedding provider: an account, or a server that speaks OpenAI's protocol.

    It is tested at once: see `status` and `last_error`.
    """
    runtime = caller.state.runtime
    with idempotent:
        _check_limits(body.provider, body.limits)
        credentials = _checked(caller, body.provider, body.credentials)
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
            idempotent.remember(session, EmbeddingProviderAnswer.model_validate(row), more_follows=True)
        return _test_by_itself(caller, row, idempotent)


def _checked(caller: Caller, provider: str, given: EmbeddingCredentials) -> dict[str, Any]:
    """The credentials, if this provider takes them. Raises ValidationFailed."""
    credentials = given.as_given()
    if not embedder_spec(provider).is_remote:
        if credentials:
            raise ValidationFailed(
                f"credentials.{next(iter(credentials))}: the {provider} provider takes no credentials."
            )
        return credentials
    if "base_url" not in credentials:
        if "api_key" not in credentials:
            raise ValidationFailed("credentials.api_key: required, unless base_url names a server that needs none.")
        return credentials
    _check_address(caller, credentials["base_url"])
    return credentials


def _check_limits(provider: str, limits: EmbeddingLimits) -> None:
    """Raises ValidationFailed for a limit that the provider cannot keep."""
    if embedder_spec(provider).is_remote:
        return
    for name in ("request_timeout_seconds", "max_input_tokens"):
        if getattr(limits, name) is not None:
            raise ValidationFailed(
                f"limits.{name}: the {provider} provider has a fixed model and no requests; leave it out."
            )


def _check_address(caller: Caller, base_url: str) -> None:
    """Refuses addresses that the service must not connect to; a name that does not resolve yet may pass."""
    parts = urlsplit(base_url)
    try:
        vetted_addresses(
            parts.hostname or "",
            parts.port or (443 if parts.scheme == "https" else 80),
            deny_private_networks=caller.state.settings.deny_private_networks,
        )
    except AddressForbidden as error:
        message, resolution = error.for_host(parts.hostname or "")
        raise ValidationFailed(f"credentials.base_url: {message}", resolution=resolution) from None
    except NameUnknown:
        return


@router.get("", responses=error_responses())
def list_embedding_providers(
    caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, name: NameFilter = None
) -> EmbeddingProviderList:
    """List embedding providers."""
    asked = PageRequest.read(limit, cursor, name=name)
    with caller.state.runtime.catalog.transaction() as session:
        page = embedding_providers.page(session, caller.environment.id, limit, asked.after, name=name)
    return list_answer(EmbeddingProviderList, page, asked, EmbeddingProviderAnswer.model_validate)


@router.get("/{embedding_provider_id}", responses=error_responses("embedding_provider_not_found"))
def get_embedding_provider(embedding_provider_id: EmbeddingProviderId, caller: Reader) -> EmbeddingProviderAnswer:
    """Get an embedding provider."""
    return EmbeddingProviderAnswer.model_validate(_get(caller, embedding_provider_id))


def _get(caller: Caller, embedding_provider_id: str) -> EmbeddingProvider:
    with caller.state.runtime.catalog.transaction() as session:
        return embedding_providers.get(session, caller.environment.id, embedding_provider_id)


@router.put(
    "/{embedding_provider_id}",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses("permission_denied", "embedding_provider_not_found", "name_conflict", "server_busy"),
)
def update_embedding_provider(
    embedding_provider_id: EmbeddingProviderId, body: EmbeddingProviderUpdate, caller: Writer
) -> EmbeddingProviderAnswer:
    """Rename an embedding provider, or give it other limits or credentials, which are tested at once."""
    given = body.model_fields_set
    provider = _get(caller, embedding_provider_id).provider
    credentials = _checked(caller, provider, body.credentials) if "credentials" in given else {}
    with caller.state.runtime.catalog.transaction() as session:
        row = embedding_providers.get(session, caller.environment.id, embedding_provider_id, lock=True)
        if "name" in given:
            embedding_providers.rename(session, row, body.name)
        if "credentials" in given:
            embedding_providers.set_credentials(row, caller.state.runtime.box, credentials)
        if "limits" in given:
            _check_limits(row.provider, body.limits)
            embedding_providers.set_limits(row, body.limits.model_dump(exclude_none=True))
    return _test_by_itself(caller, row) if "credentials" in given else EmbeddingProviderAnswer.model_validate(row)


@router.delete(
    "/{embedding_provider_id}",
    status_code=204,
    responses=error_responses("permission_denied", "embedding_provider_not_found", "embedding_provider_conflict"),
)
def delete_embedding_provider(embedding_provider_id: EmbeddingProviderId, caller: Writer) -> None:
    """Delete an embedding provider that no vector table uses."""
    with caller.state.runtime.catalog.transaction() as session:
        embedding_providers.delete(session, caller.environment.id, embedding_provider_id)


@router.post(
    "/{embedding_provider_id}/test",
    dependencies=EXTERNAL_CALLS,
    responses=error_responses("permission_denied", "embedding_provider_not_found", "server_busy"),
)
def check_embedding_provider(
    embedding_provider_id: EmbeddingProviderId, caller: Writer, body: EmbeddingProviderTest | None = None
) -> TestAnswer:
    """Test an embedding provider by embedding one word, and keep the outcome as its `status`.

    A failed test is a 200 with `status: failed`.
    """
    row = _get(caller, embedding_provider_id)
    return _test(caller, row, _test_model(caller, row, body), is_model_known=True)[0]


def _test(
    caller: Caller,
    row: EmbeddingProvider,
    model: tuple[str, int],
    *,
    is_model_known: bool,
    idempotent: IdempotentRequest | None = None,
) -> tuple[TestAnswer, EmbeddingProviderAnswer]:
    """The outcome, and the provider with it recorded; outside of any transaction, as a provider may be slow."""
    begun = time.perf_counter()
    fault: EmbeddError | None = None
    try:
        _embed_one_word(caller, row, *model)
    except EmbeddError as error:
        fault = error
    latency_ms = round((time.perf_counter() - begun) * 1000, 1)
    told = f"{fault.message} {fault.resolution}" if fault is not None else None
    # without a model that the server has, a rejection proves something only if it is one of the key
    is_certain = is_model_known or not isinstance(fault, EmbeddingRejected | RowError) or "api_key" in fault.resolution
    with caller.state.runtime.catalog.transaction() as session:
        row_now = embedding_providers.get(session, caller.environment.id, row.id, lock=True)
        if row_now.updated_at == row.updated_at:  # else other credentials came meanwhile, with a test of their own
            embedding_providers.record_test(row_now, told, is_certain=is_certain)
        shown = EmbeddingProviderAnswer.model_validate(row_now)
        if idempotent is not None:
            idempotent.remember(session, shown)
    return TestAnswer(status="failed" if told else "ok", latency_ms=latency_ms, error=told), shown


def _embed_one_word(caller: Caller, row: EmbeddingProvider, model: str, dimensions: int) -> None:
    """Returns when the provider has embedded a word. Raises what is wrong with it."""
    with open_embedder(
        row.provider,
        credentials=embedding_providers.open_credentials(row, caller.state.runtime.box),
        model=model,
        dimensions=dimensions,
        limits=row.limits,
        timeout_seconds=min(_TEST_TIMEOUT_SECONDS, caller.state.settings.request_timeout_seconds),
        deny_private_networks=caller.state.settings.deny_private_networks,
        one_text_at_a_time=True,
    ) as embedder:
        embed_question(embedder, "test")


def _test_by_itself(
    caller: Caller, row: EmbeddingProvider, idempotent: IdempotentRequest | None = None
) -> EmbeddingProviderAnswer:
    """The provider after the test that follows new credentials."""
    with caller.state.runtime.catalog.transaction() as session:
        used = embedding_providers.find_used_model(session, row.id)
    # a server of the user's own need not have the model that the catalog names first
    is_model_known = used is not None or row.base_url is None
    return _test(
        caller,
        row,
        used or _first_model(row.provider),
        is_model_known=is_model_known,
        idempotent=idempotent,
    )[1]


def _test_model(caller: Caller, row: EmbeddingProvider, body: EmbeddingProviderTest | None) -> tuple[str, int]:
    """The model to test with: the one asked for, or one in use, or the catalog's first."""
    given = body.model_fields_set if body else set()
    if body is not None and "embedding_model" in given:
        known = find_model(embedder_spec(row.provider).models, body.embedding_model)
        if "embedding_dimensions" in given:
            return body.embedding_model, body.embedding_dimensions
        if known is not None:
            return known.name, known.dimensions
        raise ValidationFailed("embedding_dimensions: required for a model that the catalog does not know.")
    if "embedding_dimensions" in given:
        raise ValidationFailed("embedding_dimensions: only accepted together with embedding_model.")
    with caller.state.runtime.catalog.transaction() as session:
        used = embedding_providers.find_used_model(session, row.id)
    return used or _first_model(row.provider)


def _first_model(provider: str) -> tuple[str, int]:
    """The provider's first known model."""
    first = embedder_spec(provider).models[0]
    return first.name, first.dimensions
