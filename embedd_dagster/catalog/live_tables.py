"""What a request needs from the catalog, in one statement: its API key, its environment and its live vector table.

Every request asks again and nothing is cached. So a revoked key is rejected at once, a deleted table disappears at once, and
the first query after a vector set is published uses that set. All joins use primary or unique keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson

from embedd_dagster.catalog import api_keys
from embedd_dagster.catalog.api_keys import AuthenticatedKey
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.environments import DEFAULT_ENVIRONMENT, EnvironmentWanted
from embedd_dagster.core.rows import VectorSet
from embedd_dagster.core.vector_table import FilterType, Mode, VectorConfiguration

_TABLE_COLUMNS: Final = """
    t.id, t.name, t.mode, t.storage_name, s.version, s.configuration::text, s.key_type, c.id, c.updated_at,
    p.id, p.provider, p.updated_at, p.limits"""

_TABLE_JOINS: Final = """
    LEFT JOIN vector_sets s ON s.vector_table_id = t.id AND s.version = t.live_version
    LEFT JOIN connections c ON c.id = t.connection_id
    LEFT JOIN embedding_providers p ON p.id = t.embedding_provider_id"""

_ACCESS: Final = f"""
SELECT k.key_hash, k.revoked_at, k.id, k.org_id, k.environment_id, k.permission, k.prefix,
    coalesce(k.rate_limit_key_id, k.id), e.id, e.name, e.created_at, {_TABLE_COLUMNS}
FROM api_keys k
    LEFT JOIN environments e ON e.org_id = k.org_id AND (k.environment_id IS NULL OR k.environment_id = e.id)
        AND e.id = coalesce(%s::text, CASE WHEN %s::text IS NULL THEN k.environment_id END, (
            SELECT d.id FROM environments d
            WHERE d.org_id = k.org_id AND d.name = coalesce(%s::text, '{DEFAULT_ENVIRONMENT}')))
    LEFT JOIN vector_tables t ON t.id = %s::text AND t.environment_id = e.id AND t.deleted_at IS NULL
    {_TABLE_JOINS}
WHERE k.key_hash = %s::bytea"""  # noqa: S608 - the text has no input of a caller

_LIVE_TABLE: Final = f"""
SELECT {_TABLE_COLUMNS}
FROM vector_tables t {_TABLE_JOINS}
WHERE t.id = %s::text AND t.environment_id = %s::text AND t.deleted_at IS NULL"""  # noqa: S608 - as above


@dataclass(frozen=True, slots=True)
class ProviderRef:
    """The embedding provider of a vector table. Its secrets are read when it is opened, once per `updated_at`."""

    id: str
    kind: str
    updated_at: datetime
    limits: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LiveTable:
    """A vector table as a query sees it. `configuration` and `vector_set` describe the live set; None before the first."""

    id: str
    name: str
    mode: Mode
    connection_id: str
    connection_updated_at: datetime
    provider: ProviderRef | None
    configuration: VectorConfiguration | None
    vector_set: VectorSet | None


class RequestEnvironment(NamedTuple):
    """The environment of a request."""

    id: str
    name: str
    created_at: datetime


class Access(NamedTuple):
    """A valid API key, with the environment and the vector table of its request: None if not found for this key."""

    key: AuthenticatedKey
    environment: RequestEnvironment | None
    table: LiveTable | None


def find_access(catalog: Catalog, raw_key: str, environment: EnvironmentWanted, vector_table_id: str = "") -> Access:
    """The key, its environment, and the vector table of this id. Without an environment: the one of the key, or `prod`.

    Raises Unauthorized, CatalogUnavailable.
    """
    key_hash = api_keys.hash_key(raw_key)
    row = catalog.lookups.fetch_one(
        _ACCESS, (environment.id, environment.name, environment.name, vector_table_id, key_hash)
    )
    if row is None:
        raise api_keys.unknown_key()
    api_keys.check(key_hash, row[0], row[1])
    found = None if row[8] is None else RequestEnvironment(*row[8:11])
    return Access(AuthenticatedKey(*row[2:8]), found, _live_table(*row[11:]))


def find_live(catalog: Catalog, environment_id: str, vector_table_id: str) -> LiveTable | None:
    """The vector table as it is now; None if the environment does not have it."""
    row = catalog.lookups.fetch_one(_LIVE_TABLE, (vector_table_id, environment_id))
    return None if row is None else _live_table(*row)


def _live_table(
    vector_table_id: str | None,
    name: str,
    mode: str,
    storage_name: str,
    version: int | None,
    configuration: str | None,
    key_type: str | None,
    connection_id: str,
    connection_updated_at: datetime,
    provider_id: str | None,
    provider_kind: str,
    provider_updated_at: datetime,
    provider_limits: dict[str, Any],
) -> LiveTable | None:
    if vector_table_id is None:
        return None
    provider = None
    if provider_id is not None:
        provider = ProviderRef(provider_id, provider_kind, provider_updated_at, provider_limits)
    parsed = vector_set = None
    if version is not None and configuration is not None:
        parsed, filter_types = _parse(configuration)
        vector_set = VectorSet(
            vector_table_id, version, storage_name, parsed.embedding_dimensions, filter_types, key_type
        )
    return LiveTable(
        vector_table_id, name, Mode(mode), connection_id, connection_updated_at, provider, parsed, vector_set
    )


@lru_cache(maxsize=1024)
def _parse(configuration: str) -> tuple[VectorConfiguration, dict[str, FilterType]]:
    parsed = VectorConfiguration.from_json(orjson.loads(configuration))
    return parsed, parsed.filter_types
