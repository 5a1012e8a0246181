"""Organizations and their environments."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from sqlalchemy import delete as delete_rows
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from embedd_dagster.catalog.clock import new_id, now
from embedd_dagster.catalog.conflicts import name_must_be_free
from embedd_dagster.catalog.pages import Page, Position, fetch_page, having
from embedd_dagster.catalog.tables import (
    ApiKey,
    Connection,
    EmbeddingProvider,
    Environment,
    Organization,
    Task,
    VectorTable,
)
from embedd_dagster.errors import Conflict, NotFound

DEFAULT_ORGANIZATION: Final = "default"
DEFAULT_ENVIRONMENT: Final = "prod"
_ID: Final = re.compile(r"env_[0-9a-z]{26}")
_NAME: Final = re.compile(r"[a-z0-9_-]{1,50}")


class EnvironmentWanted(NamedTuple):
    """The environment that a request names, by one of the two or by none."""

    id: str | None = None
    name: str | None = None

    @classmethod
    def read(cls, given: str | None) -> EnvironmentWanted:
        """What this text may mean: an id if it has the form of one, otherwise a name. None means none."""
        if given is None:
            return cls()
        if _ID.fullmatch(given):
            return cls(id=given)
        # what cannot be a name is one that nothing has
        return cls(name=given if _NAME.fullmatch(given) else "")


def ensure_defaults(session: Session) -> Environment:
    """The environment `prod` of the organization `default`, made where it is missing. Idempotent."""
    organization = session.scalar(
        select(Organization).where(Organization.name == DEFAULT_ORGANIZATION).with_for_update()
    )
    if organization is None:
        organization = Organization(id=new_id("org"), name=DEFAULT_ORGANIZATION, created_at=now())
        session.add(organization)
        session.flush()
    environment = find_by_name(session, organization.id, DEFAULT_ENVIRONMENT)
    return environment or create(session, organization.id, DEFAULT_ENVIRONMENT)


def create_organization(session: Session, name: str) -> Organization:
    """A further organization, with its environment `prod`."""
    organization = Organization(id=new_id("org"), name=name, created_at=now())
    session.add(organization)
    session.flush()
    create(session, organization.id, DEFAULT_ENVIRONMENT)
    return organization


def create(session: Session, org_id: str, name: str) -> Environment:
    """A new environment. Raises Conflict."""
    environment = Environment(id=new_id("env"), org_id=org_id, name=name, created_at=now())
    with name_must_be_free(session, "environment", name):
        session.add(environment)
    return environment


def get(session: Session, org_id: str, environment_id: str) -> Environment:
    """The environment. Raises NotFound, also for one of another organization."""
    environment = find(session, org_id, environment_id)
    if environment is None:
        raise NotFound("environment", environment_id)
    return environment


def find(session: Session, org_id: str, environment_id: str) -> Environment | None:
    """The organization's environment of this id, or None."""
    environment = session.get(Environment, environment_id)
    return environment if environment is not None and environment.org_id == org_id else None


def find_by_name(session: Session, org_id: str, name: str) -> Environment | None:
    """The organization's environment of this name, or None."""
    return session.scalar(select(Environment).where(Environment.org_id == org_id, Environment.name == name))


def page(
    session: Session, org_id: str, limit: int, after: Position | None, *, name: str | None = None
) -> Page[Environment]:
    """The organization's environments (of this name), newest first."""
    statement = select(Environment).where(Environment.org_id == org_id)
    return fetch_page(session, having(statement, {Environment.name: name}), Environment, limit, after)


def delete(session: Session, org_id: str, environment_id: str) -> None:
    """Removes an empty environment, with the keys that were good for it alone. Raises NotFound, Conflict."""
    environment = get(session, org_id, environment_id)
    used_by = {
        noun: session.scalar(select(func.count()).select_from(model).where(model.environment_id == environment_id)) or 0
        for noun, model in (
            ("connections", Connection),
            ("embedding providers", EmbeddingProvider),
            ("vector tables", VectorTable),
        )
    }
    if any(used_by.values()):
        listed = ", ".join(f"{count} {noun}" for noun, count in used_by.items() if count)
        raise Conflict(
            f"Environment {environment.name!r} still holds {listed}.",
            code="environment_conflict",
            resolution="Delete what is in it first.",
        )
    # of vector tables that are gone
    session.execute(delete_rows(Task).where(Task.environment_id == environment_id))
    for key in session.scalars(select(ApiKey).where(ApiKey.environment_id == environment_id)):
        session.delete(key)
    session.flush()
    session.delete(environment)
