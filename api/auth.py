"""Who asks, in which environment, and whether they may."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from embedd_dagster.catalog import api_keys, environments
from embedd_dagster.catalog.api_keys import Permission
from embedd_dagster.catalog.environments import DEFAULT_ENVIRONMENT, EnvironmentWanted
from embedd_dagster.catalog.tables import ApiKey, Environment
from embedd_dagster.errors import NotFound, PermissionDenied, Unauthorized

from .state import ApiState

_KEY: Final = re.compile(r"sk_[A-Za-z0-9_-]{20,100}")
MAX_SHOWN: Final = 64

_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key, `sk_…`")


@dataclass(frozen=True, slots=True)
class Caller:
    """A known key, and the environment that its request is made in."""

    state: ApiState
    key: ApiKey
    environment: Environment

    @property
    def org_id(self) -> str:
        """The organization, outside of which nothing is ever seen."""
        return self.key.org_id

    @property
    def only_environment_id(self) -> str | None:
        """The one environment that the key is good for; None where it is good for all of its organization."""
        return self.key.environment_id


def check_key_form(raw_key: str | None) -> str:
    """The key, if it may be one. Raises Unauthorized."""
    if raw_key is None:
        raise Unauthorized("There is no API key in the request.")
    if not _KEY.fullmatch(raw_key):
        raise api_keys.unknown_key()
    return raw_key


def authenticate(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    x_environment_id: Annotated[
        str | None,
        Header(
            description="The environment of the request, by its id or its name; left out, the key's own, or else the one "
            "named `prod`",
            examples=["env_1q3k8zc0v5tq9n2m4x7wb6dhpa"],
        ),
    ] = None,
) -> Caller:
    """The caller, asked of the catalog at every request, so that a revoked key stops at once.

    Raises Unauthorized, RateLimitExceeded, NotFound for an environment that is not the key's.
    """
    raw_key = check_key_form(credentials.credentials if credentials else None)
    state: ApiState = request.app.state.embedd
    with state.runtime.catalog.transaction() as session:
        key = api_keys.authenticate(session, raw_key)
        request.state.key_prefix = key.prefix
        environment = _find_environment(session, key, x_environment_id)
    # not within the transaction: a Redis that hangs must not keep the catalog's connections
    standing, excess = state.rate_limiter.hit(key.counted_as)
    request.state.rate_limit = standing
    if excess is not None:
        raise excess
    if isinstance(environment, NotFound):
        raise environment
    return Caller(state, key, environment)


def _find_environment(session: Session, key: ApiKey, wanted: str | None) -> Environment | NotFound:
    by = EnvironmentWanted.read(wanted if wanted is not None else key.environment_id or DEFAULT_ENVIRONMENT)
    if by.name is None:
        found = environments.find(session, key.org_id, by.id or "")
    else:
        found = environments.find_by_name(session, key.org_id, by.name)
    if found is None or key.environment_id not in (None, found.id):
        return NotFound("environment", (wanted or key.environment_id or DEFAULT_ENVIRONMENT)[:MAX_SHOWN])
    return found


Reader = Annotated[Caller, Depends(authenticate)]
"""Any key: for what changes nothing."""


def require_full(caller: Reader) -> Caller:
    """The caller, if the key may change something. Raises PermissionDenied."""
    if caller.key.permission != Permission.FULL:
        raise PermissionDenied("The key is read_only: it may send GET requests and queries.")
    return caller


Writer = Annotated[Caller, Depends(require_full)]
"""A key with permission `full`."""
