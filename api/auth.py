"""Authentication: the API key of a request, its environment, its rate limit, and its permission.

`find_caller_access` and `admit` are the only implementation. The dependencies below call them for FastAPI's routes,
`query_route.py` calls them for queries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers

from embedd_dagster.catalog import api_keys
from embedd_dagster.catalog.api_keys import AuthenticatedKey, Permission
from embedd_dagster.catalog.environments import DEFAULT_ENVIRONMENT, EnvironmentWanted
from embedd_dagster.catalog.live_tables import Access, RequestEnvironment, find_access
from embedd_dagster.catalog.tables import Environment
from embedd_dagster.errors import NotFound, PermissionDenied, Unauthorized

from .state import ApiState

_KEY: Final = re.compile(r"sk_[A-Za-z0-9_-]{20,100}")
_MAX_SHOWN: Final = 64

_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key, `sk_…`")


@dataclass(frozen=True, slots=True)
class Caller:
    """A valid API key, and the environment of its request."""

    state: ApiState
    key: AuthenticatedKey
    environment: Environment

    @property
    def org_id(self) -> str:
        """The organization of the key. The request sees nothing of other organizations."""
        return self.key.org_id

    @property
    def only_environment_id(self) -> str | None:
        """The only environment in which the key is valid; None: all environments of its organization."""
        return self.key.environment_id


def find_caller_access(state: ApiState, headers: Headers, environment: str | None, vector_table_id: str = "") -> Access:
    """What the catalog has for the request's key and environment, and for the vector table if one is given.

    Every request reads it again: a revoked key is rejected at once. Raises Unauthorized, CatalogUnavailable.
    """
    scheme, raw_key = get_authorization_scheme_param(headers.get("authorization"))
    if scheme.lower() != "bearer" or not raw_key:
        raise Unauthorized("The request has no API key.")
    if not _KEY.fullmatch(raw_key):
        raise api_keys.unknown_key()
    return find_access(state.runtime.catalog, raw_key, EnvironmentWanted.read(environment), vector_table_id)


def admit(
    state: ApiState, request_state: dict[str, Any], access: Access, environment: str | None
) -> RequestEnvironment:
    """Counts the request against the rate limit, and returns its environment.

    Leaves in `request_state` what the log and the response headers say. Raises RateLimitExceeded, and NotFound if the
    environment does not exist or the key is not valid in it.
    """
    request_state["key_prefix"] = access.key.prefix
    request_state["rate_limit"], exceeded = state.rate_limiter.hit(access.key.rate_limit_key_id)
    if exceeded is not None:
        raise exceeded
    if access.environment is None:
        raise NotFound("environment", (environment or access.key.environment_id or DEFAULT_ENVIRONMENT)[:_MAX_SHOWN])
    return access.environment


def authenticate(
    request: Request,
    _scheme: Annotated[object, Security(_bearer)],  # for the OpenAPI document
    x_environment_id: Annotated[
        str | None,
        Header(
            description="The environment of the request, by its id or its name. Default: the environment of the key, or "
            "`prod` if the key is valid in all environments",
            examples=["env_1q3k8zc0v5tq9n2m4x7wb6dhpa"],
        ),
    ] = None,
) -> Caller:
    """The caller. Raises as `find_caller_access` and `admit` do."""
    state: ApiState = request.app.state.embedd
    access = find_caller_access(state, request.headers, x_environment_id)
    # outside of any transaction: a Redis that hangs must not block connections to the catalog
    found = admit(state, request.scope["state"], access, x_environment_id)
    return Caller(state, access.key, Environment(**found._asdict(), org_id=access.key.org_id))


Reader = Annotated[Caller, Depends(authenticate)]
"""Any valid key: for operations that change nothing."""


def require_full(caller: Reader) -> Caller:
    """The caller, if its key may change something. Raises PermissionDenied."""
    if caller.key.permission != Permission.FULL:
        raise PermissionDenied("The key is read_only: it may only send GET requests and queries.")
    return caller


Writer = Annotated[Caller, Depends(require_full)]
"""A key with permission `full`."""
