"""What a query of a vector table has to know, in one statement: who asks, in which environment, and what is live.

Asked anew by every query, and nothing of the answer is kept: so a revoked key stops at once, a deleted table is gone at
once, and the first query after a swap goes to the new set. All joins are by primary or unique keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import orjson

from embedd_dagster.catalog import api_keys
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

_OF_KEY: Final = f"""
SELECT coalesce(k.rate_limit_key_id, k.id), k.key_hash, k.prefix, k.revoked_at, e.id, {_TABLE_COLUMNS}
FROM api_keys k
    LEFT JOIN environments e ON e.org_id = k.org_id AND (k.environment_id IS NULL OR k.environment_id = e.id)
        AND e.id = coalesce(%s::text, CASE WHEN %s::text IS NULL THEN k.environment_id END, (
            SELECT d.id FROM environments d
            WHERE d.org_id = k.org_id AND d.name = coalesce(%s::text, '{DEFAULT_ENVIRONMENT}')))
    LEFT JOIN vector_tables t ON t.id = %s::text AND t.environment_id = e.id AND t.deleted_at IS NULL
    {_TABLE_JOINS}
WHERE k.key_hash = %s::bytea"""  # noqa: S608 - nothing of a caller's is in it

_OF_ENVIRONMENT: Final = f"""
SELECT {_TABLE_COLUMNS}
FROM vector_tables t {_TABLE_JOINS}
WHERE t.id = %s::text AND t.environment_id = %s::text AND t.deleted_at IS NULL"""  # noqa: S608 - as above


@dataclass(frozen=True, slots=True)
class ProviderRef:
    """The embedding provider of a vector table; its secrets are read when it is opened, once for each `updated_at`."""

    id: str
    kind: str
    updated_at: datetime
    limits: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LiveTable:
    """A vector table as a query sees it; `configuration` and `vector_set` are those of the live set, None before one is."""

    id: str
    name: str
    mode: Mode
    connection_id: str
    connection_updated_at: datetime
    provider: ProviderRef | None
    configuration: VectorConfiguration | None
    vector_set: VectorSet | None


@dataclass(frozen=True, slots=True)
class QueryAccess:
    """A known key that was not revoked, with what it has asked for: None where that is not there, or not the key's."""

    counted_as: str
    """The id that the request is counted under."""
    key_prefix: str
    environment_id: str | None
    table: LiveTable | None


def authorize_query(
    catalog: Catalog, raw_key: str, environment: EnvironmentWanted, vector_table_id: str
) -> QueryAccess:
    """Who asks with this key, and what is live in the table. Without an environment, the key's own is meant, or `prod`.

    Raises Unauthorized, CatalogUnavailable.
    """
    wanted = api_keys.hash_key(raw_key)
    row = catalog.lookups.fetch_one(
        _OF_KEY, (environment.id, environment.name, environment.name, vector_table_id, wanted)
    )
    if row is None:
        raise api_keys.unknown_key()
    counted_as, key_hash, prefix, revoked_at, found_environment_id, *table = row
    api_keys.check(wanted, key_hash, revoked_at)
    return QueryAccess(counted_as, prefix, found_environment_id, _live_table(*table))


def find_live(catalog: Catalog, environment_id: str, vector_table_id: str) -> LiveTable | None:
    """The vector table as it is now; None where it is not there, or not in this environment."""
    row = catalog.lookups.fetch_one(_OF_ENVIRONMENT, (vector_table_id, environment_id))
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
