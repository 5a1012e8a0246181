"""Environments."""

from __future__ import annotations

from fastapi import APIRouter

from embedd_dagster.catalog import environments
from embedd_dagster.catalog.environments import DEFAULT_ENVIRONMENT
from embedd_dagster.catalog.tables import Environment
from embedd_dagster.errors import Conflict, NotFound, PermissionDenied

from ..auth import Caller, Reader, Writer
from ..error_codes import error_responses
from ..idempotency import Idempotent, idempotent_responses
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, NameFilter, PageRequest, list_answer, pagination
from ..schemas.base import EnvironmentId
from ..schemas.environments import EnvironmentAnswer, EnvironmentCreate, EnvironmentList
from ..strict_json import StrictRoute

router = APIRouter(prefix="/environments", tags=["Environments"], route_class=StrictRoute)


def _reject_restricted(caller: Caller) -> None:
    if caller.only_environment_id is not None:
        raise PermissionDenied(
            "The key is valid in one environment only: it cannot create or delete environments.",
            resolution="Use a key that is valid in all environments of the organization.",
        )


@router.post("", status_code=201, responses=idempotent_responses(201, "permission_denied", "name_conflict"))
def create_environment(body: EnvironmentCreate, caller: Writer, idempotent: Idempotent) -> EnvironmentAnswer:
    """Create an environment."""
    _reject_restricted(caller)
    with idempotent, caller.state.runtime.catalog.transaction() as session:
        return idempotent.remember(
            session, EnvironmentAnswer.model_validate(environments.create(session, caller.org_id, body.name))
        )


@router.get("", responses=error_responses())
def list_environments(
    caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, name: NameFilter = None
) -> EnvironmentList:
    """List the environments in which the key is valid."""
    asked = PageRequest.read(limit, cursor, name=name)
    if caller.only_environment_id is not None:
        own = [caller.environment] if name in (None, caller.environment.name) else []
        return EnvironmentList(
            data=[EnvironmentAnswer.model_validate(found) for found in own], pagination=pagination(None, limit)
        )
    with caller.state.runtime.catalog.transaction() as session:
        page = environments.page(session, caller.org_id, limit, asked.after, name=name)
    return list_answer(EnvironmentList, page, asked, EnvironmentAnswer.model_validate)


@router.get("/{environment_id}", responses=error_responses())
def get_environment(environment_id: EnvironmentId, caller: Reader) -> EnvironmentAnswer:
    """Get an environment."""
    return EnvironmentAnswer.model_validate(_get(caller, environment_id))


def _get(caller: Caller, environment_id: str) -> Environment:
    if caller.only_environment_id not in (None, environment_id):
        raise NotFound("environment", environment_id)
    with caller.state.runtime.catalog.transaction() as session:
        return environments.get(session, caller.org_id, environment_id)


@router.delete(
    "/{environment_id}", status_code=204, responses=error_responses("permission_denied", "environment_conflict")
)
def delete_environment(environment_id: EnvironmentId, caller: Writer) -> None:
    """Delete an empty environment, with the keys that are valid only in it."""
    environment = _get(caller, environment_id)
    _reject_restricted(caller)
    if environment.name == DEFAULT_ENVIRONMENT:
        raise Conflict(
            f"Environment {DEFAULT_ENVIRONMENT!r} is the default of requests without X-Environment-Id and cannot be deleted.",
            code="environment_conflict",
            resolution="Delete its content instead.",
        )
    with caller.state.runtime.catalog.transaction() as session:
        environments.delete(session, caller.org_id, environment_id)
