"""Embedding providers: accounts, their sealed keys and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.conflicts import mendable, must_be_unused, name_must_be_free
from embedd_dagster.catalog.connections import ConnectionStatus
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.secrets import SecretBox
from embedd_dagster.catalog.tables import EmbeddingProvider, Environment, VectorTable
from embedd_dagster.errors import Conflict, NotFound


def create(
    session: Session,
    box: SecretBox,
    environment: Environment,
    *,
    name: str,
    provider: str,
    credentials: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> EmbeddingProvider:
    """A new provider. Raises Conflict."""
    row = EmbeddingProvider(
        id=new_id("ep"),
        org_id=environment.org_id,
        environment_id=environment.id,
        name=name,
        provider=provider,
        limits=dict(limits),
        created_at=now(),
        updated_at=now(),
    )
    set_credentials(row, box, credentials)
    try:
        with name_must_be_free(session, "embedding provider", name):
            session.add(row)
    except Conflict as conflict:
        raise mendable(session, conflict, EmbeddingProvider, environment.id, name) from None
    return row


def set_credentials(row: EmbeddingProvider, box: SecretBox, credentials: Mapping[str, Any]) -> None:
    """Replaces the key and the `base_url`; the provider counts as untested."""
    row.base_url = credentials.get("base_url")
    row.credentials = box.seal({k: v for k, v in credentials.items() if k != "base_url"}, row_id=row.id)
    row.status = ConnectionStatus.PENDING.value
    row.updated_at = now()


def record_test(row: EmbeddingProvider, error: str | None, *, is_certain: bool = True) -> None:
    """Moves the status by the outcome of a test: `error` is None for a good one.

    A test that is not certain found a server that answers, but none of its models: the status stays `pending`.
    """
    failed = ConnectionStatus.FAILED if is_certain else ConnectionStatus.PENDING
    row.status = (ConnectionStatus.CONNECTED if error is None else failed).value
    row.last_error = error
    row.tested_at = now()


def open_credentials(row: EmbeddingProvider, box: SecretBox) -> dict[str, Any]:
    """Everything needed to call the provider, `api_key` and `base_url`. Raises SecretUnreadable."""
    secrets = box.open(row.credentials, row_id=row.id)
    return {**secrets, "base_url": row.base_url} if row.base_url else secrets


def rename(session: Session, row: EmbeddingProvider, name: str) -> None:
    """Another name. Raises Conflict."""
    if name != row.name:
        with name_must_be_free(session, "embedding provider", name):
            row.name = name
            row.updated_at = now()


def set_limits(row: EmbeddingProvider, limits: Mapping[str, Any]) -> None:
    """Replaces the limits."""
    row.limits = dict(limits)
    row.updated_at = now()


def find_used_model(session: Session, provider_id: str) -> tuple[str, int] | None:
    """A model, with its dimensions, that a vector table uses the provider for; None where there is none."""
    statement = (
        select(VectorTable.embedding_model, VectorTable.embedding_dimensions)
        .where(VectorTable.embedding_provider_id == provider_id, VectorTable.deleted_at.is_(None))
        .limit(1)
    )
    found = session.execute(statement).one_or_none()
    return None if found is None else (found.embedding_model, found.embedding_dimensions)


def get(session: Session, environment_id: str, provider_id: str, *, lock: bool = False) -> EmbeddingProvider:
    """The provider. Raises NotFound, also for one of another environment."""
    row = session.get(EmbeddingProvider, provider_id, with_for_update=lock or None, populate_existing=lock)
    if row is None or row.environment_id != environment_id:
        raise NotFound("embedding_provider", provider_id)
    return row


def page(
    session: Session, environment_id: str, limit: int, after: Position | None, *, name: str | None = None
) -> Page[EmbeddingProvider]:
    """The environment's providers (of this name), newest first."""
    statement = select(EmbeddingProvider).where(EmbeddingProvider.environment_id == environment_id)
    return fetch_page(session, having(statement, {EmbeddingProvider.name: name}), EmbeddingProvider, limit, after)


def delete(session: Session, environment_id: str, provider_id: str) -> None:
    """Removes a provider that nothing uses. Raises NotFound, Conflict."""
    row = get(session, environment_id, provider_id)
    must_be_unused(session, "embedding provider", row, VectorTable.embedding_provider_id)
    session.delete(row)
