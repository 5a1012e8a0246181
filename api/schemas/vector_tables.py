"""Vector tables."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from embedd_dagster.catalog.table_details import TableDetails
from embedd_dagster.catalog.tables import VectorTable
from embedd_dagster.connectors.registry import MAX_DIMENSIONS
from embedd_dagster.core.vector_table import MAX_COLUMNS, Column, ColumnRole, FilterType, Mode

from ..pagination import ListAnswer
from ..schemas.base import Answer, Body, Name, Timestamp, unset, valid_id

SyncStatusName = Literal["pending", "backfilling", "synced", "pending_rebackfill", "paused", "error"]
_Identifier = Annotated[str, StringConstraints(min_length=1, max_length=255)]
_Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ColumnBody(Body):
    """A column that is embedded, or stored with the vector as metadata to filter by. A column may have both roles."""

    name: _Identifier = Field(description="Column name in the source table", examples=["TITLE"])
    role: Literal["embedding", "metadata"]
    ordinal: int | None = Field(
        default=None,
        ge=-1_000_000,
        le=1_000_000,
        description="Order in the embedded text; columns without an ordinal come last",
    )
    name_prefix: Annotated[str, StringConstraints(max_length=1000)] | None = Field(
        default=None, description="Text before the value in the embedded text", examples=["title: "]
    )
    filter_type: Literal["keyword", "integer", "float", "boolean"] | None = Field(
        default=None, description="Required for metadata columns: how values are compared"
    )

    def to_column(self) -> Column:
        """The column as a value of the core."""
        return Column(
            name=self.name,
            role=ColumnRole(self.role),
            ordinal=self.ordinal,
            name_prefix=self.name_prefix,
            filter_type=FilterType(self.filter_type) if self.filter_type else None,
        )


class ColumnAnswer(Answer):
    """A configured column, without the fields that do not apply to its role."""

    name: str
    role: Literal["embedding", "metadata"]
    ordinal: int | None = Field(default_factory=unset)
    name_prefix: str | None = Field(default_factory=unset)
    filter_type: Literal["keyword", "integer", "float", "boolean"] | None = Field(default_factory=unset)


_Columns = Annotated[list[ColumnBody], Field(min_length=1, max_length=MAX_COLUMNS)]
_Dimensions = Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)]
_Cron = Annotated[str, StringConstraints(min_length=1, max_length=100)]
_COLUMNS_EXAMPLE: list[dict[str, Any]] = [
    {"name": "TITLE", "role": "embedding", "ordinal": 1, "name_prefix": "title: "},
    {"name": "DESCRIPTION", "role": "embedding", "ordinal": 2},
    {"name": "CATEGORY", "role": "metadata", "filter_type": "keyword"},
    {"name": "PRICE", "role": "metadata", "filter_type": "float"},
    {"name": "IN_STOCK", "role": "metadata", "filter_type": "boolean"},
]


class VectorTableCreate(Body):
    """A new vector table."""

    name: Name = Field(
        description="Vector table name, 1 to 100 characters; unique in the environment", examples=["product-search"]
    )
    connection_id: Annotated[str, AfterValidator(valid_id("conn", "connection"))] = Field(
        description="Source database connection. It must have passed its test and have the same mode"
    )
    embedding_provider_id: Annotated[str, AfterValidator(valid_id("ep", "embedding_provider"))] | None = Field(
        default=None, description="Required in managed mode, and in platform mode if the source cannot embed by itself"
    )
    source_table: _Identifier = Field(
        description="Source table or view: `table` or `schema.table`, by the name rules of the database",
        examples=["PRODUCTS"],
    )
    primary_key_column: _Identifier = Field(description="A column that is unique and never null", examples=["ID"])
    columns: _Columns = Field(description="At least one embedding column", examples=[_COLUMNS_EXAMPLE])
    embedding_model: _Model = Field(description="See GET /v1/embedding-models", examples=["text-embedding-3-small"])
    embedding_dimensions: _Dimensions = Field(description="Vector dimensions, supported by the model", examples=[1536])
    mode: Literal["managed", "platform"] = Field(
        default="managed",
        description="Where vectors are stored: `managed` in the vector store of this installation, "
        "`platform` in the source database",
    )
    sync_mode: Literal["batch", "cdc"] = Field(
        default="batch",
        description="How changes in the source are found: `batch` compares digests on a schedule; "
        "`cdc` reads the log of the source, usually within a second",
    )
    sync_schedule: _Cron | None = Field(
        default=None,
        description="Batch tables: a cron with five fields, in UTC; null: the default",
        examples=["*/15 * * * *"],
    )
    sync_interval_seconds: Annotated[int, Field(ge=1, le=3600)] | None = Field(
        default=None,
        description="cdc tables: how long changes are collected before they are applied; null: they are applied at once",
    )


class VectorTableUpdate(Body):
    """Changes of a vector table. Fields that are left out stay as they are."""

    immutable_fields = frozenset(
        {
            "id", "org_id", "environment_id", "connection_id", "embedding_provider_id", "primary_key_column",
            "mode", "sync_mode", "sync_status", "qdrant_collection", "platform_vector_ref",
            "total_rows", "synced_rows", "rows_skipped", "rows_truncated", "stage", "dagster_partition",
            "created_at", "updated_at",
        }
    )  # fmt: skip

    name: Name = Field(default_factory=unset, description="Updated name; the vectors stay where they are")
    source_table: _Identifier = Field(
        default_factory=unset,
        description="Batch tables: the new name of the table, if it was renamed. A sync embeds only what differs",
    )
    columns: _Columns = Field(default_factory=unset, description="Updated column configuration (triggers re-backfill)")
    embedding_model: _Model = Field(default_factory=unset, description="New embedding model (triggers re-backfill)")
    embedding_dimensions: _Dimensions = Field(
        default_factory=unset, description="New dimensions (triggers re-backfill)"
    )
    sync_schedule: _Cron | None = Field(default_factory=unset, description="Batch tables: a cron; null: the default")
    sync_interval_seconds: Annotated[int, Field(ge=1, le=3600)] | None = Field(
        default_factory=unset, description="cdc tables; null: changes are applied at once"
    )


class VectorTableAnswer(Answer):
    """A vector table."""

    id: str = Field(examples=["vt_1q3k8zc0v5tq9n2m4x7wb6dhpa"])
    org_id: str
    environment_id: str
    connection_id: str
    embedding_provider_id: str | None
    name: str = Field(examples=["product-search"])
    source_table: str = Field(examples=["PRODUCTS"])
    primary_key_column: str = Field(examples=["ID"])
    columns: list[ColumnAnswer] = Field(examples=[_COLUMNS_EXAMPLE])
    embedding_model: str = Field(examples=["text-embedding-3-small"])
    embedding_dimensions: int = Field(examples=[1536])
    mode: Literal["managed", "platform"]
    sync_mode: Literal["batch", "cdc"]
    sync_status: SyncStatusName
    qdrant_collection: str | None = Field(
        description="In managed mode: the name of the live vectors in the vector store",
        examples=["vt_1q3k8zc0_product-search"],
    )
    platform_vector_ref: str | None = Field(description="In platform mode: the view over the live vectors")
    total_rows: int = Field(description="Rows of the source at the last run")
    synced_rows: int = Field(description="Rows with a vector at the last run")
    rows_skipped: int = Field(
        description="Rows without text in the embedding columns at the last run; they have no vector"
    )
    rows_truncated: int = Field(
        description="Rows whose text was cut at the model's limit, in the last backfill and each sync since"
    )
    stage: str | None = Field(
        description="What its pending or running task does, see `progress.stage` of the task; null if there is none"
    )
    dagster_partition: str = Field(
        description="Its partition of the asset `vector_table` in Dagster. It does not change when the vector table is renamed",
        examples=["vt_1q3k8zc0_product-search"],
    )
    sync_schedule: str | None
    sync_interval_seconds: int | None
    created_at: Timestamp
    updated_at: Timestamp

    @classmethod
    def of(cls, row: VectorTable, details: TableDetails) -> VectorTableAnswer:
        """The response for a vector table."""
        return cls(
            id=row.id,
            org_id=row.org_id,
            environment_id=row.environment_id,
            connection_id=row.connection_id,
            embedding_provider_id=row.embedding_provider_id,
            name=row.name,
            source_table=row.source_table,
            primary_key_column=row.primary_key_column,
            columns=[ColumnAnswer(**column) for column in row.columns],
            embedding_model=row.embedding_model,
            embedding_dimensions=row.embedding_dimensions,
            mode=row.mode,
            sync_mode=row.sync_mode,
            sync_status=row.sync_status,
            qdrant_collection=row.storage_name if row.mode == Mode.MANAGED else None,
            platform_vector_ref=row.platform_vector_ref,
            total_rows=details.total_rows,
            synced_rows=details.synced_rows,
            rows_skipped=details.rows_skipped,
            rows_truncated=details.rows_truncated,
            stage=details.stage,
            dagster_partition=row.partition_key,
            sync_schedule=row.sync_schedule,
            sync_interval_seconds=row.sync_interval_seconds,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class VectorTableList(ListAnswer[VectorTableAnswer]):
    """A page of vector tables."""


class BackfillAnswer(Answer):
    """A queued backfill."""

    vector_table_id: str
    status: Literal["backfilling"]
    total_rows: int = Field(description="As last counted, or as the source estimates", examples=[10000])
    synced_rows: int = Field(examples=[0])
    task_id: str = Field(description="GET /v1/tasks/{task_id} shows its progress")


class SourceColumnAnswer(Answer):
    """A column of the source table."""

    name: str = Field(examples=["ID"])
    type: str = Field(description="The type name of the source", examples=["NUMBER"])
    nullable: bool


class SourceSchemaAnswer(Answer):
    """The columns of the source table."""

    columns: list[SourceColumnAnswer]


class EstimateAnswer(Answer):
    """What a backfill of the current configuration would need, estimated from a sample."""

    rows: int = Field(description="Rows of the source table", examples=[10000])
    sampled_rows: int = Field(description="Rows in the sample", examples=[512])
    rows_to_embed: int = Field(examples=[9500])
    rows_reused: int = Field(description="Rows whose vector in the live set can be reused", examples=[400])
    rows_skipped: int = Field(description="Rows without text, which get no vector", examples=[100])
    tokens: int = Field(description="Estimated with four bytes per token", examples=[855000])
    cost_usd: float = Field(
        description="At the list price; 0 if the price of the model is not known", examples=[0.0171]
    )
    seconds: float = Field(
        description="At the configured limits of the provider, otherwise at measured speed", examples=[2.0]
    )
