"""API keys."""

from __future__ import annotations

from fastapi import APIRouter

from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.errors import NotFound

from ..auth import Reader, Writer
from ..error_codes import error_responses
from ..idempotency import IdempotentPerKey, idempotent_responses
from ..pagination import DEFAULT_LIMIT, Cursor, Limit, NameFilter, PageRequest, list_answer
from ..schemas.api_keys import ApiKeyAnswer, ApiKeyCreate, ApiKeyList, NewApiKeyAnswer
from ..schemas.base import ApiKeyId
from ..strict_json import StrictRoute

router = APIRouter(prefix="/api-keys", tags=["API keys"], route_class=StrictRoute)


@router.post("", status_code=201, responses=idempotent_responses(201, "permission_denied"))
def create_api_key(body: ApiKeyCreate, caller: Writer, idempotent: IdempotentPerKey) -> NewApiKeyAnswer:
    """Create an API key. A key that is valid in one environment can only create keys for that environment.

    A key and the keys that it created share one rate limit.
    """
    environment_id = body.environment_id or caller.only_environment_id
    if caller.only_environment_id not in (None, environment_id):
        raise NotFound("environment", str(environment_id))
    with idempotent, caller.state.runtime.catalog.transaction() as session:
        if environment_id is not None:
            environments.get(session, caller.org_id, environment_id)
        new = api_keys.create(
            session, caller.org_id, environment_id, body.name, Permission(body.permission), made_by=caller.key
        )
        return idempotent.remember(
            session, NewApiKeyAnswer(key=new.raw, api_key=ApiKeyAnswer.model_validate(new.api_key))
        )


@router.get("", responses=error_responses())
def list_api_keys(
    caller: Reader, limit: Limit = DEFAULT_LIMIT, cursor: Cursor = None, name: NameFilter = None
) -> ApiKeyList:
    """List API keys, including revoked ones. The keys themselves are never shown again."""
    asked = PageRequest.read(limit, cursor, name=name)
    with caller.state.runtime.catalog.transaction() as session:
        page = api_keys.page(session, caller.org_id, caller.only_environment_id, limit, asked.after, name=name)
    return list_answer(ApiKeyList, page, asked, ApiKeyAnswer.model_validate)


@router.delete("/{api_key_id}", status_code=204, responses=error_responses("permission_denied", "api_key_not_found"))
def revoke_api_key(api_key_id: ApiKeyId, caller: Writer) -> None:
    """Revoke an API key, at once and permanently."""
    with caller.state.runtime.catalog.transaction() as session:
        api_keys.revoke(session, caller.org_id, caller.only_environment_id, api_key_id)
