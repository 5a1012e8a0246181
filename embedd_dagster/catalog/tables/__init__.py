"""The catalog's tables as SQLAlchemy maps them. The modules next to this package read and change them.

All are imported here, so that `Base.metadata` is complete when one of them is imported.
"""

from embedd_dagster.catalog.tables.base import Base
from embedd_dagster.catalog.tables.endpoints import CdcStreamRow, Connection, EmbeddingProvider, ProviderBudget
from embedd_dagster.catalog.tables.tasks import RunHeartbeat, Task
from embedd_dagster.catalog.tables.tenants import ApiKey, Environment, IdempotencyKey, Organization
from embedd_dagster.catalog.tables.vector_tables import CdcState, FailedRow, Shard, VectorSetRow, VectorTable

__all__ = [
    "ApiKey",
    "Base",
    "CdcState",
    "CdcStreamRow",
    "Connection",
    "EmbeddingProvider",
    "Environment",
    "FailedRow",
    "IdempotencyKey",
    "Organization",
    "ProviderBudget",
    "RunHeartbeat",
    "Shard",
    "Task",
    "VectorSetRow",
    "VectorTable",
]
